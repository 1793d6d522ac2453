"""How our packages find each other beside packages of the same names, and the import paths of 0.1."""
