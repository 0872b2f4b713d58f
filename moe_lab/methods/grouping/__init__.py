"""Which experts of a layer become one, for method=merge: a file each."""
