"""Train modular inverters or a reconstructor: `accelerate launch train/inverter.py --config FILE
key=value`; `model.family` says which.
"""

from featinv_diffusion.training.entry import run_family_script
from featinv_diffusion.training.inverter import InverterConfig, train_inverter
from featinv_diffusion.training.reconstructor import ReconstructorConfig, train_reconstructor

FAMILIES = {
    "detr": (InverterConfig, train_inverter),
    "vit": (InverterConfig, train_inverter),
    "reconstructor": (ReconstructorConfig, train_reconstructor),
}

if __name__ == "__main__":
    run_family_script(FAMILIES, __doc__)
