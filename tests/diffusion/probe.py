"""The one way in which tests sample from a pipeline that was loaded somewhere.

Subprocesses without the package run this file as text, so it imports torch alone.
"""

import torch

torch.set_num_threads(1)


def sample(pipe):
    """Two images of two steps `[2, 3, 64, 64]`, the same for equal pipelines."""
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(images=images, num_inference_steps=2, generator=generators, output_type="pt").images
