"""CPU kernels for thin convolutions: machine code written for one kernel shape, stride and channel count at a time.

PyTorch's kernels lay channels out side by side and work on multiples of eight or sixteen; with three channels most of
the arithmetic units idle. Here lanes run along a row of the map, which is long whatever the channels are.
"""
