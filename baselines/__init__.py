"""The systems that CPLearn is compared with, one file each: a pure loss, its head, its Objective.

Every batch statistic is that of the joint batch, with gradient through the reduction wherever the system has gradient:
N processes, or micro-batches, descend the loss of one on all images together."""

BASELINES = {}  # --objective -> its class
