"""Backend "cuda": launchers of the C++ kernels in csrc/, one file per op, signatures as in kernels.

Each file has `unsupported(call)`, which refuses in words, and a launcher that allocates, and
passes addresses, sizes, strides and the stream to `bertgpt._C`.
"""
