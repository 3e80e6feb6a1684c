"""What test_quantized.py runs in a process with 4 devices: bytes that a step needs per layer.

Prints JSON: what is trained how, and the form of the base → temporary bytes on one device per layer
more, by the compiler; and of each form the bytes that a device stores of a layer.
"""

import json

from jax_lora.config import RunConfig
from jax_lora.model.config import LlamaConfig
from jax_lora.planning.compile import lower_step
from jax_lora.planning.memory import memory
from jax_lora.planning.steps import steps_of
from jax_lora.planning.targets import target
from jax_lora.training.resolve import resolve

# The four devices divide the blocks of all forms along 256 and 512 inputs but those of Q4_K, whose
# outputs they cut instead.
FORMS = {"none": (), "int8": (), "nf4": (), "Q8_0": ("Q8_0",), "Q4_K": ("Q4_K",)}
CASES = {
    "remat none": ({"remat": "none"}, ("none", "nf4")),
    "remat full": ({"remat": "full"}, tuple(FORMS)),
    "DoRA": ({"remat": "full", "lora.variant": "dora"}, ("none", "Q4_K")),
}
FEW, MANY = 2, 6


def step(form: str, layers: int, **keys):
    shape = LlamaConfig(64, 256, 512, layers, 4, 4, 64)
    kinds = tuple((name, FORMS[form]) for name in shape.linear_shapes())
    config = RunConfig().replace(
        model_quantization="gguf" if FORMS[form] else form,
        dtype="float32",
        unroll=1,
        loss_chunk=32,
        batch_size=4,
        **{"lora.dropout": 0.0, "mesh.fsdp": 4, "mesh.data": 1, "data.buckets": (32,), **keys},
    )
    (found,) = steps_of(resolve(config, shape, "cpu", 4, kinds))
    return found


def main():
    temporary, stored = {case: {} for case in CASES}, {}
    for case, (keys, forms) in CASES.items():
        for form in forms:
            few, many = (step(form, layers, **keys) for layers in (FEW, MANY))
            lowered = [lower_step(one, target("cpu"))["accumulate"] for one in (few, many)]
            needs = [one.compile().memory_analysis().temp_size_in_bytes for one in lowered]
            temporary[case][form] = (needs[1] - needs[0]) / (MANY - FEW)
            stored[form] = (memory(many).base - memory(few).base) / (MANY - FEW)
    print(json.dumps([temporary, stored]))


if __name__ == "__main__":
    main()
