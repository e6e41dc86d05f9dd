"""The recursive model as it learns: its forward pass ends in losses instead of logits.

The logits of a batch are by far its largest table, so they are never made as a whole: the hidden states go to
`chunked_losses`, which makes them piece by piece. This happens inside the model's own forward pass, because under FSDP
the head's parameters are whole only there.
"""

import copy

import torch
from torch import Tensor

from rrtc.model.configuration_rrt import RrtConfig
from rrtc.model.modeling_rrt import RrtForCausalLM
from rrtc.plan import Visit, ends_of_loops
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.linear import attention_distance
from rrtc.stock.parts import Parts, states_of
from rrtc.uptrain import bmi
from rrtc.uptrain.losses import chunked_losses, hidden_distance
from rrtc.uptrain.teacher import LiveLesson, MeanLesson

EXIT_LOSSES = {"next_token": 1.0, "forward_kl": 1.0}  # paper appendix J: with self-distillation
JOINT_LOSSES = {"forward_kl": 1.0}  # later loops weigh more, as in LayerSkip (Elhoushi et al. 2024, §4.1.2)


class Student(RrtForCausalLM):
    """An RrtForCausalLM that is told what comes next, and returns losses. It learns without dropout, which a few old
    architectures ask for (GPT-2): what the teacher says has none, and a step would not be repeatable."""

    def __init__(self, config: RrtConfig):
        config = copy.deepcopy(config)
        for name, value in vars(config.base_config).items():
            if "drop" in name and isinstance(value, float):  # attn_pdrop, hidden_dropout, layerdrop …
                setattr(config.base_config, name, 0.0)
        super().__init__(config)

    def add_critic(self, seed: int) -> None:
        """Gives the student what the regularizer bmi needs; nothing that saves a model saves it."""
        self.critic = bmi.Critic(len(self.loop_ends) * self.config.get_text_config().hidden_size, seed)
        self._keys_to_ignore_on_save = {*(self._keys_to_ignore_on_save or ()), *self.critic_names}

    @property
    def critic_names(self) -> list[str]:
        """The names of the critic's parameters, which are no part of the model; none where there is no critic."""
        return [name for name, _ in self.named_parameters() if name.startswith("critic.")]

    @property
    def loop_ends(self) -> tuple[int, ...]:
        """The places of the layers with which loops end, the last one too."""
        visits = [Visit(**visit) for visit in self.config.visits]
        return *ends_of_loops(visits), len(visits) - 1

    def forward(
        self, input_ids: Tensor, targets: Tensor, recipe: UptrainRecipe, lesson=None, progress: float = 0.0, **kwargs
    ) -> dict:
        """Means over the tokens by name: `objective`, which has a gradient, and what it is made of (see losses.py).
        With exits, counted by their loops from 1, also `exit_1_loss`, `exit_1_kl` (from the model's own final
        distribution, or, where they learn jointly, from the mean of that and the teacher's) and so on. With the
        regularizer bmi also `bmi`, and from its second phase on `raml`.

        input_ids, targets: (windows, context), int64. lesson: what the teacher says of the same input_ids, or None.
        progress: the share of the steps that were taken. With the loss attention, that alone is there, and its gradient
        is by feature maps and gains (see stock/linear.py).
        kwargs, such as position_ids, go to the stock base model.
        """
        parts, head = Parts(self.stock), self.stock.get_output_embeddings()
        if recipe.transfers:
            distance = attention_distance(self, lambda: parts.run(input_ids, **kwargs))
            return {"objective": recipe.losses["attention"] * distance, "attention": distance.detach()}

        def compare(hidden: Tensor, weights: dict[str, float], lesson) -> dict[str, Tensor]:
            return chunked_losses(
                hidden.flatten(0, 1),
                parts.head,
                list(head.parameters()),
                head.weight.shape[0],
                targets.flatten(),
                weights,
                recipe.temperature,
                lesson,
            )

        def at_exits(outputs: list, end: Tensor, before: Tensor) -> dict[str, Tensor]:
            """The objective with what the exits say beside the model that says `end` (windows, context, width), and
            what that is made of. outputs: of the layers with an exit. before: the objective without them."""
            own, joint = LiveLesson(parts, end, recipe.temperature), recipe.exits == "joint"
            learned = MeanLesson(lesson, own) if joint and lesson is not None else own
            shares = [loop if joint else 1 for loop in range(1, len(outputs) + 1)]
            whole, means = 1.0 if recipe.exits == "frozen" else recipe.exit_weight, {"objective": before}
            for loop, (place, output) in enumerate(zip(self.loop_ends[:-1], outputs, strict=True), 1):
                left = parts.after(input_ids, place, output, **kwargs)
                found = compare(left, JOINT_LOSSES if joint else EXIT_LOSSES, learned)
                weight, distance = whole * shares[loop - 1] / sum(shares), found.pop("objective")
                if joint:  # an exit's distance is many times the model's own at first, which would hardly learn
                    weight = weight * (before.detach() / distance.detach()).clamp(max=1)
                means["objective"] = means["objective"] + weight * distance
                means |= {f"exit_{loop}_{name}": mean for name, mean in found.items()}
            return means

        if recipe.exits == "frozen":
            with torch.no_grad():
                hidden, outputs = parts.run(input_ids, self.loop_ends[:-1], **kwargs)
            return at_exits(outputs, hidden, torch.zeros((), device=input_ids.device))

        matches, regularizes = bool(recipe.losses.get("hidden")), bool(recipe.regularizers.get("bmi"))
        loop_ends = self.loop_ends
        exits = loop_ends[:-1] if recipe.exits != "none" else ()
        ends = loop_ends if regularizes else exits
        hidden, outputs = parts.run(input_ids, range(len(parts.layers)) if matches else ends, **kwargs)
        means = compare(hidden, recipe.losses, lesson)
        if matches:
            distance = hidden_distance([states_of(output) for output in outputs], lesson.states)
            means["objective"] = means["objective"] + recipe.losses["hidden"] * distance
            means["hidden"] = distance.detach()
            outputs = [outputs[index] for index in ends]
        if regularizes:
            states = [states_of(output) for output in outputs]
            means |= self._regularize(means["objective"], states, input_ids, recipe, progress)
            outputs = outputs[: len(exits)]
        return means | at_exits(outputs, hidden, means["objective"]) if exits else means

    def _regularize(
        self, objective: Tensor, states: list[Tensor], ids: Tensor, recipe: UptrainRecipe, progress: float
    ) -> dict[str, Tensor]:
        """`objective` with the regularizer bmi, and its parts. states: at the end of each loop, for `ids`."""
        length = bmi.segment_length(ids.shape[1])
        with torch.autocast(ids.device.type, enabled=False):
            code = bmi.codes(states, length)
            first = bmi.first_phase(self.critic, code)
        found, sum_ = {"bmi": first.detach()}, first
        if progress >= bmi.SECOND_PHASE:
            with torch.autocast(ids.device.type, enabled=False):
                window, x, behind, weights = bmi.second_pairs(self.critic, code)
            segments = ids[:, : ids.shape[1] // length * length].unflatten(1, (-1, length))
            pairs = torch.cat([segments[window, x], segments[window, behind]], 1)
            raml = weights @ self._said_of_the_second(pairs)
            found["raml"] = raml.detach()
            sum_ = sum_ + bmi.RAML * raml
        return {"objective": objective + recipe.regularizers["bmi"] * sum_} | found

    def _said_of_the_second(self, pairs: Tensor) -> Tensor:
        """The mean loss of the second half of each row of `pairs` (rows, tokens), which follows the first: (rows,)."""
        parts, head = Parts(self.stock), self.stock.get_output_embeddings()
        half = pairs.shape[1] // 2
        hidden, _ = parts.run(pairs[:, :-1])
        losses = [
            chunked_losses(
                row[half - 1 :], parts.head, list(head.parameters()), head.weight.shape[0], ids[half:],
                {"next_token": 1.0}, 1.0, None,
            )["objective"]
            for row, ids in zip(hidden, pairs, strict=True)
        ]  # fmt: skip
        return torch.stack(losses)
