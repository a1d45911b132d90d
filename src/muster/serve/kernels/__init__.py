"""What serving computes fast on a CPU: C++ in `cpp/`, compiled on first use, beside the same in plain torch.

`ops.py` is the contract and chooses; `reference.py` says what each operation means and runs anywhere; `native.py` calls
the C++ that `build.py` compiles and keeps, and `stack.py` all of it at once; `packing.py` lays weights out. Nothing is
compiled at import.
"""
