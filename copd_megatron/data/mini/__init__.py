"""The mini suite: questions about digits, as text, as pictures or videos of real handwriting, for a model that learns
on a CPU.

A question is an operation and a few digits: `sum 3852=` in text; `sum=` behind an image with the same digits as
handwritten scans, or behind a video that shows them one after another. The wanted response is the digits as read, `>`,
and the answer: `3852>18`. The scans are real (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, part of the
package: nothing is downloaded).

SYNTHETIC: two things are made up to give reinforcement and distillation something to do at this size. By default the
operation `srt` has another convention in each modality (ascending in text and videos, descending in images; the setting
`conflict` chooses which operations have), and the demonstrations of the cold start follow a wrong rule with a set
probability. `MiniTask.describe` states both, and every table of results prints it.
"""

from copd_megatron.data.mini.source import MiniSource
from copd_megatron.data.mini.task import MiniTask

__all__ = ["MiniSource", "MiniTask"]
