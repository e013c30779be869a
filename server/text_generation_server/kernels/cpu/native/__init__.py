"""Our own products, in C++: every coding, at any number of rows, for each instruction set (see linear.h).

The library is built with the package (`build.py`). Where no compiler was found it is missing, and torch's operators
serve. A variant is used for a coding only after it gave, on this processor, what plain arithmetic gives.
"""
