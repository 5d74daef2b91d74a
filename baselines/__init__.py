"""The systems that CPLearn is compared with, one file each: a pure loss, its head, its Objective.

Every batch statistic is that of the joint batch, with gradient through the reduction wherever the system has gradient:
N processes, or micro-batches, descend the loss of one on all images together."""

from baselines.barlow_twins import BarlowTwins
from baselines.dino import DINO
from baselines.gedi import GEDI, GEDINoGen
from baselines.lejepa import LeJEPA
from baselines.self_classifier import SelfClassifier
from baselines.swav import SwAV
from baselines.vicreg import VICReg
from baselines.visreg import VISReg

BASELINES = {  # --objective -> its class; of a shared flag, the first that has it defines it
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
    "dino": DINO,
    "self_classifier": SelfClassifier,
    "gedi_no_gen": GEDINoGen,
    "gedi": GEDI,
    "lejepa": LeJEPA,
    "visreg": VISReg,
}
