"""Language models behind a guard: the contract and its runners."""
