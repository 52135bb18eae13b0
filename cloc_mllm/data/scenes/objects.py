"""One object of a scene: what it is and where it stands."""

from __future__ import annotations

from dataclasses import dataclass

Box = tuple[int, int, int, int]
Pair = tuple[str, str]


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape: Name of the shape.
        colour: Name of the colour.
        size: Name of the size.
        texture: Name of the texture.
        box: Tight x1, y1, x2, y2 of the whole object (also where another one hides a part), pixels.
        pixels: Longest side of the box.
        angle: Turn in degrees.
    """

    shape: str
    colour: str
    size: str
    texture: str
    box: Box
    pixels: int
    angle: int

    @property
    def pair(self) -> Pair:
        """The (shape, colour) pair, which may be held out of training."""
        return self.shape, self.colour

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def attributes(self) -> dict[str, str]:
        """The four words that describe the object."""
        return {"shape": self.shape, "colour": self.colour, "size": self.size, "texture": self.texture}
