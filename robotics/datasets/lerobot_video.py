"""Video files of LeRobotDataset through PyAV: many episodes one after another in an mp4, found by their times.

H.264, a key frame at every second frame and no frame that depends on a later one (ours; lerobot's own default is AV1
with the same spacing), so that any reader can seek to any frame.  Video loses detail: PNG images come back exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from gencontrol.errors import UsageError
from gencontrol.robotics.datasets.storage import Array, reading, require

OPTIONS = {"crf": "18", "g": "2", "bf": "0", "preset": "fast"}


class FrameWriter:
    """Writes frames to one mp4 at a constant rate, with options of libx264."""

    def __init__(
        self, path: Path, fps: float, height: int, width: int, options: Mapping[str, str] = MappingProxyType(OPTIONS)
    ) -> None:
        if height % 2 or width % 2:
            raise UsageError(f"video needs even image sides, not {height} × {width}; write with images='png'.")
        av = require("av")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.frames, self._closed = path, 0, False
        self._av, self._rate = av, Fraction(fps).limit_denominator(100_000)
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=self._rate, options=dict(options))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"

    def write(self, images: Array) -> tuple[float, float]:
        """Append uint8 [T h w 3]; returns the time of the first frame and of the one after the last, in seconds."""
        first = self.frames
        for image in images:
            frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = self.frames, 1 / self._rate
            self._mux(frame)
            self.frames += 1
        return float(first / self._rate), float(self.frames / self._rate)

    def size(self) -> int:
        """Bytes on disk so far; the encoder holds back some frames."""
        return self.path.stat().st_size if self.path.exists() else 0

    def info(self) -> dict[str, Any]:
        """Return what lerobot keeps of a video in info.json."""
        return {
            "video.height": self._stream.height,
            "video.width": self._stream.width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": int(self._rate) if self._rate.denominator == 1 else float(self._rate),
            "video.channels": 3,
            "has_audio": False,
        }

    def close(self) -> None:
        """Finish the file; further calls do nothing."""
        if not self._closed:
            self._closed = True
            if self.frames:
                self._mux(None)
            self._container.close()

    def _mux(self, frame: Any) -> None:
        """Encode one frame, or what is left for None."""
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def read_frames(path: Path, spans: Sequence[tuple[float, int]], fps: float) -> list[Array]:
    """Decode the frames of some episodes in one pass over a file.

    Args:
        spans: for each episode the time of its first frame in the file (s) and its number of frames.
        fps: frames per second.

    Returns:
        uint8 [T h w 3] for each span.

    Raises:
        UsageError: the file is missing or damaged, or has no frame within half a period of a time.
    """
    av = require("av")
    if not path.is_file():
        raise UsageError(f"there is no video '{path}'; copy the data set again, with its videos.")
    found: list[Array | None] = [None] * len(spans)
    order = sorted(range(len(spans)), key=lambda place: spans[place][0])
    starts = [spans[place][0] for place in order]
    seen = [np.zeros(count, dtype=bool) for _, count in spans]
    with reading(path, av.FFmpegError, ValueError), av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            # spans do not overlap; a frame within half a period of a row's time is the row's
            place = order[max(bisect_right(starts, frame.time + 0.5 / fps) - 1, 0)]
            row = round((frame.time - spans[place][0]) * fps)
            if 0 <= row < spans[place][1]:
                image = frame.to_ndarray(format="rgb24")
                block = found[place]
                if block is None:
                    block = found[place] = np.empty((spans[place][1], *image.shape), dtype=np.uint8)
                block[row], seen[place][row] = image, True
    for block, have, (start, _) in zip(found, seen, spans, strict=True):
        if block is None or not have.all():
            lost = int(np.argmin(have))
            raise UsageError(f"'{path}' has no frame at {start + lost / fps:.3f} s; the video is cut short.")
    return [block for block in found if block is not None]
