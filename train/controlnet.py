"""Train a FeatInv ControlNet: `accelerate launch train/controlnet.py --config FILE key=value`."""

from featinv_diffusion.training.controlnet import ControlNetConfig, train_controlnet
from featinv_diffusion.training.entry import run_script

if __name__ == "__main__":
    run_script(ControlNetConfig, train_controlnet, __doc__)
