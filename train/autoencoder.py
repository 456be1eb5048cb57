"""Train a small AutoencoderKL: `accelerate launch train/autoencoder.py --config FILE key=value`."""

from featinv_diffusion.training.autoencoder import AutoencoderConfig, train_autoencoder
from featinv_diffusion.training.entry import run_script

if __name__ == "__main__":
    run_script(AutoencoderConfig, train_autoencoder, __doc__)
