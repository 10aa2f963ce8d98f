"""Register the model ``specdec`` for lm-eval, when this module is imported (needs the extra ``lm-eval``).

Log-likelihoods are log-probabilities of prompt tokens; text is generated with a drafter. Run as a program, this module
is lm-eval's command with the model registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lm_eval.models  # noqa: F401 (lm-eval registers its own models only if there are none yet)
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from specdec.api.decoder import SpecDecoder
from specdec.base.errors import SpecDecError
from specdec.base.options import SamplingOptions

LIMITS = "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"


@register_model("specdec")  # type: ignore[untyped-decorator]
class SpecDecLM(TemplateLM):  # type: ignore[misc]
    """The model ``specdec`` of lm-eval: scores and generates text with a ``SpecDecoder``.

    pretrained: a ``SpecDecoder``, or the name of a model to load one for.
    drafter: the drafter to load, such as "m2r2", "none" or "auto".
    batch_size: number of prompts that run together; "auto": 8.
    max_batch_size: ignored; lm-eval passes it.
    device: PyTorch's name of the device; None, or CUDA where there is none: chosen automatically.
    dtype: dtype of the weights by name; "auto": the checkpoint's.
    max_length: largest number of tokens of a text, without its last token; None: as many as the model's context allows.
    max_gen_toks: largest number of new tokens if a task sets no limit.
    more: further keyword arguments of ``SpecDecoder.from_pretrained``.
    Raises SpecDecError if the decoder has no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | SpecDecoder,
        drafter: str = "auto",
        *,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **more: Any,
    ) -> None:
        super().__init__()
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the default of lm-eval's command is 'cuda:0'
        if isinstance(pretrained, str):
            more = {"device": device or "auto", "dtype": dtype, "learn": False, **more}
            pretrained = SpecDecoder.from_pretrained(pretrained, drafter, **more)
        self.decoder, self.tokenizer = pretrained, pretrained.tokenizer
        if self.tokenizer is None:
            raise SpecDecError("lm-eval needs a tokenizer; give SpecDecoder one")
        self.batch_size = 8 if batch_size == "auto" else int(batch_size)
        most = self.decoder.target.context - 2  # the last token is scored, and one is generated
        self.max_length, self.max_gen_toks = min(max_length or most, most), max_gen_toks

    # -- text ---------------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token or self.tokenizer.eos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return [int(token) for token in self.tokenizer.encode(string, add_special_tokens=add_special_tokens)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **how))

    # -- scores -------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        texts = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        for start in range(0, len(texts), self.batch_size):
            scored = self.decoder.generate_batch(
                texts[start : start + self.batch_size],
                max_new_tokens=1,
                temperature=0.0,
                logprobs=1,
                prompt_logprobs=True,
            )
            for n, output in enumerate(scored, start):
                tokens = (output.prompt_logprobs or [])[-len(requests[n][2]) :]
                greedy = all(token.top[0][0] == token.token_id for token in tokens)
                found[n] = sum(token.logprob for token in tokens), greedy
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, owners = list[Any](), list[int]()
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *utils.make_disjoint_window(part)) for part in parts]
            owners += [number] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += score
        return sums

    # -- generated text -----------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for n, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(n)
        for group in groups.values():
            options = _options(requests[group[0]].args[1], self.max_gen_toks)
            most = self.max_length - options["max_new_tokens"]
            if most < 1:
                raise SpecDecError(
                    f"{options['max_new_tokens']} new tokens leave no room for a prompt in {self.max_length} tokens; "
                    "lower max_gen_toks"
                )
            prompts = [self.tok_encode(requests[n].args[0])[-most:] for n in group]
            options["apply_chat_template"] = True  # of token ids it only says that the text begins anew, as in hf
            outputs = self.decoder.generate_batch(prompts, max_rows=self.batch_size, **options)
            for n, output in zip(group, outputs, strict=True):
                found[n] = output.text
        return found


def _options(given: dict[str, Any], most: int) -> dict[str, Any]:
    """Translate the generation options of an lm-eval task into keyword arguments of ``SpecDecoder.generate_batch``.

    The result has ``max_new_tokens``, ``stop`` and the sampling options; without "do_sample", decoding is greedy unless
    the task sets a temperature; with it, the temperature is 1 unless the task sets one. Raises SpecDecError for options
    that ``SpecDecoder`` does not have.
    given: the task's options, such as "until" and "temperature". most: number of new tokens if the task sets no limit.
    """
    until = given.get("until") or []
    options: dict[str, Any] = {
        name: given[name] for name in SamplingOptions.__annotations__ if given.get(name) is not None
    }
    for name in given.keys() - {*SamplingOptions.__annotations__, *LIMITS, "until", "do_sample"}:
        if given[name] not in (None, 0, 1):  # num_beams=1 and the like change nothing
            raise SpecDecError(f"specdec cannot generate with {name}={given[name]}; leave it out of generation_kwargs")
    if not given.get("do_sample", bool(options.get("temperature"))):
        options["temperature"] = 0.0
    options.setdefault("temperature", 1.0)
    count = next((given[name] for name in LIMITS if given.get(name)), most)
    return options | {"max_new_tokens": int(count), "stop": [until] if isinstance(until, str) else list(until)}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
