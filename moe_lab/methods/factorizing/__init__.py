"""Forms in which method=factorize writes the matrices of a layer's experts: a class each."""
