"""Widgets of a notebook: `slider` scales concepts, `paint` paints cells; pictures follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from featinv_diffusion.app.edits import Edit, Erase, Materials, Mirror, Paint, Scale, apply_all
from featinv_diffusion.app.members import at_quality, has_places
from featinv_diffusion.app.studio import find_strongest
from featinv_diffusion.concepts import ConceptDictionary, load_concepts
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.runs.record import to_png
from featinv_diffusion.runs.samples import Samples, sample, to_captions
from featinv_diffusion.runs.sampling import read_maps
from featinv_diffusion.types import FeatureMaps

MOST, STEP = 4.0, 0.05
BRUSHES = {"second picture": Paint, "erase": Erase, "mirror": Mirror, "restore": None}
MARKS = {Paint: "B", Erase: "0", Mirror: "M"}


def slider(
    inverter: Inverter,
    features: Any,
    concepts: ConceptDictionary | str | Path,
    *,
    n_concepts: int = 6,
    n_samples: int = 4,
    seed: int = 0,
) -> ConceptSliders:
    """Shows sliders of the concepts that hold most of a map, and pictures that follow them.

    While a slider moves there is one quick picture (quality `draft`); the button draws the samples
    of the inverter's own quality. Each slider is the factor on its concept's part: 0 removes it, 1
    changes nothing (FeatInv, algorithm 1).

    Args:
        features: one map `[1, c, h, w]`, or a picture.
        concepts: a dictionary of concepts or an SAE, or its file.

    Raises:
        InputError: more maps than one, concepts of other features, or ipywidgets is missing.
    """
    dictionary = concepts if isinstance(concepts, ConceptDictionary) else load_concepts(concepts)
    if dictionary.spec is not None:
        inverter.spec.check_matches(dictionary.spec)
    maps = _one_map(inverter, features)
    return ConceptSliders(inverter, maps, dictionary, n_concepts, n_samples, seed)


def paint(inverter: Inverter, a: Any, b: Any, *, n_samples: int = 4, seed: int = 0) -> MapPainter:
    """Shows the cells of A's map as buttons, which take those of B, are erased or mirrored.

    Args:
        a, b: maps `[1, c, h, w]`, or pictures.

    Raises:
        InputError: more maps than one, features without places, or ipywidgets is missing.
    """
    if not has_places(inverter.spec):
        raise InputError(
            f"Cells must be places of a picture to be painted, but the inverter reads a "
            f"{inverter.spec}. Use the inverter of a map."
        )
    return MapPainter(inverter, _one_map(inverter, a), _one_map(inverter, b), n_samples, seed)


def _one_map(inverter: Inverter, given: Any) -> FeatureMaps:
    maps = read_maps(inverter, given)
    if len(maps) != 1:
        raise InputError(f"One picture or feature map is needed here, got {len(maps)}.")
    return maps


class _Redrawn:
    """A widget whose pictures follow edits of one map.

    Attributes:
        features: the edited map.
        samples: the pictures that are shown.
    """

    def __init__(
        self,
        inverter: Inverter,
        first: FeatureMaps,
        second: FeatureMaps | None,
        n_samples: int,
        seed: int,
    ):
        if find_spec("ipywidgets") is None:
            raise InputError(
                "Widgets need ipywidgets, which is not installed: "
                "pip install 'featinv-diffusion[app]'."
            )
        import ipywidgets

        self.inverter, self.first, self.second = inverter, first, second
        self.n_samples, self.seed = n_samples, seed
        self.samples: Samples = self._sample("draft", 1)
        self.picture = ipywidgets.Image(format="png", value=self._drawn())
        self.full = ipywidgets.Button(description="Draw in full")
        self.full.on_click(lambda _button: self.settle())

    @property
    def features(self) -> FeatureMaps:
        """The map after the edits, with the noise of the unedited one."""
        second = None if self.second is None else self.second.as_subclass(Tensor)
        materials = Materials(self.first.as_subclass(Tensor), second, self._load_concepts)
        edited = apply_all(self.edits(), materials)
        return FeatureMaps.of(edited.contiguous(), self.first.sources)

    def edits(self) -> Sequence[Edit]:
        """Returns what was changed, as values."""
        return []

    def redraw(self) -> None:
        """Shows one quick picture of the edited map."""
        self._show(self._sample("draft", 1))

    def settle(self) -> None:
        """Shows all samples of the edited map, of the inverter's own quality."""
        settings = self.inverter.settings
        self._show(self._sample(settings and settings.quality, self.n_samples))

    def _load_concepts(self, name: str) -> ConceptDictionary:
        raise InputError(f"There are no concepts {name!r} here.")

    def _sample(self, quality: str | None, n_samples: int) -> Samples:
        inverter = self.inverter if quality is None else at_quality(self.inverter, quality)
        return sample(inverter, self.features, n_samples=n_samples, seed=self.seed)

    def _show(self, samples: Samples) -> None:
        self.samples = samples
        self.picture.value = self._drawn()

    def _drawn(self) -> bytes:
        (done,) = self.samples.reconstructions
        original = done.original or done.samples[0]
        row = GridRow(original, done.job.name, done.samples, to_captions(done.cosine))
        return to_png(make_grid([row]))

    @cached_property
    def widget(self) -> Any:
        """What a notebook shows."""
        import ipywidgets

        return ipywidgets.VBox([*self._controls(), self.full, self.picture])

    def _controls(self) -> list[Any]:
        return []

    def _repr_mimebundle_(self, **given: Any) -> Any:
        return self.widget._repr_mimebundle_(**given)


class ConceptSliders(_Redrawn):
    """Sliders of concepts, see `slider`.

    Attributes:
        sliders: by the number of the concept.
    """

    def __init__(
        self,
        inverter: Inverter,
        maps: FeatureMaps,
        dictionary: ConceptDictionary,
        n_concepts: int,
        n_samples: int,
        seed: int,
    ):
        self.dictionary = dictionary
        self.sliders: dict[int, Any] = {}
        super().__init__(inverter, maps, None, n_samples, seed)
        import ipywidgets

        for i, share, _ in find_strongest(maps, dictionary, n_concepts):
            one = ipywidgets.FloatSlider(
                value=1.0, min=0.0, max=MOST, step=STEP, description=f"{i} ({share:.0%})"
            )
            one.observe(lambda _change: self.redraw(), names="value")
            self.sliders[i] = one

    def edits(self) -> Sequence[Edit]:
        """Returns the factors that are not 1."""
        moved = [(i, one.value) for i, one in self.sliders.items() if one.value != 1]
        return [Scale("concepts", moved)] if moved else []

    def _load_concepts(self, name: str) -> ConceptDictionary:
        return self.dictionary

    def _controls(self) -> list[Any]:
        return list(self.sliders.values())


class MapPainter(_Redrawn):
    """Cells of a map as buttons, see `paint`.

    Attributes:
        brush: what a button does to its cell.
        buttons: of all cells, row by row.
    """

    def __init__(
        self,
        inverter: Inverter,
        a: FeatureMaps,
        b: FeatureMaps,
        n_samples: int,
        seed: int,
    ):
        self.kinds: dict[int, type[Paint | Erase | Mirror]] = {}
        super().__init__(inverter, a, b, n_samples, seed)
        import ipywidgets

        h, w = inverter.spec.grid
        self.brush = ipywidgets.ToggleButtons(options=list(BRUSHES), description="Brush")
        size = ipywidgets.Layout(width="auto", height="2rem", padding="0")
        self.buttons = [
            ipywidgets.Button(
                description="·", tooltip=f"row {i // w + 1}, column {i % w + 1}", layout=size
            )
            for i in range(h * w)
        ]
        for i, button in enumerate(self.buttons):
            button.on_click(lambda _button, cell=i: self.press(cell))

    def press(self, cell: int) -> None:
        """Uses the brush on a cell, numbered row by row."""
        kind = BRUSHES[str(self.brush.value)]
        self.kinds.pop(cell, None)
        if kind is not None:
            self.kinds[cell] = kind
        self.buttons[cell].description = "·" if kind is None else MARKS[kind]
        self.redraw()

    def edits(self) -> Sequence[Edit]:
        """Returns the painted cells, those that are mirrored first."""
        grid = list(self.inverter.spec.grid)
        found: list[Edit] = []
        for kind in (Mirror, Paint, Erase):
            cells = sorted(i for i, own in self.kinds.items() if own is kind)
            found += [kind(cells, grid)] if cells else []
        return found

    def _controls(self) -> list[Any]:
        import ipywidgets

        _, w = self.inverter.spec.grid
        layout = ipywidgets.Layout(
            grid_template_columns=f"repeat({w}, 2.2rem)", width="max-content"
        )
        return [self.brush, ipywidgets.GridBox(self.buttons, layout=layout)]
