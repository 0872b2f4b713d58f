"""Pictures for print and screen, in colours that colour-blind readers can tell apart."""
