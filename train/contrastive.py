"""Train a small SigLIP or SigLIP 2: `accelerate launch train/contrastive.py --config FILE`."""

from featinv_diffusion.training.contrastive import ContrastiveConfig, train_contrastive
from featinv_diffusion.training.entry import run_script

if __name__ == "__main__":
    run_script(ContrastiveConfig, train_contrastive, __doc__)
