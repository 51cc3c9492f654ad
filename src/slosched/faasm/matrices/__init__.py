"""Faasm's matrices (USENIX ATC'20, section 6.4): a product by divide and conquer, as a graph of calls."""
