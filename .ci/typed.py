"""Use the public types of the installed specdec, so that a type checker shows what a user's checker sees. Never run."""

from typing import assert_type

from specdec import GenerationOutput, SpecDecoder
from specdec.drafters.m2r2 import M2R2Drafter

decoder = SpecDecoder.from_pretrained("smollm2-135m-instruct", drafter="m2r2")
output = assert_type(decoder.generate("Why is the sky blue?", max_new_tokens=8), GenerationOutput)
assert_type(output.metrics.mean_acceptance_length, float)
assert_type(M2R2Drafter.name, str)
