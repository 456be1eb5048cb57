"""Train a small text-conditional UNet: `accelerate launch train/text_to_image.py --config FILE`."""

from featinv_diffusion.training.entry import run_script
from featinv_diffusion.training.text_to_image import TextToImageConfig, train_text_to_image

if __name__ == "__main__":
    run_script(TextToImageConfig, train_text_to_image, __doc__)
