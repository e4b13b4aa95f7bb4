"""One image over several processes: tiles of one step on the ranks of a ``torch.distributed`` process group.

``ranks`` says who takes part, ``wire`` moves bytes between them and gives up after a time-out, ``packed`` turns tensors
into such bytes, ``agreement`` compares what ranks are about to do, ``executor`` runs a step, ``sums`` adds up in the
order of ranks, ``outputs`` brings what they predict to one of them, and ``slides`` brings several images together.
"""
