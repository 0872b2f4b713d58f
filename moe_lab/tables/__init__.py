"""One table from many reports: `python -m moe_lab.tables FOLDER`."""
