"""The quality of a quantized base: SmolLM2-135M after the same training, its base in four forms.

    make base
    python study.py --workdir=studies/quantization --config=configs/study_quantization.py:\\
data=natural-instructions

"none" is the file's Q4_1 widened; `gguf` keeps its blocks, and int8 and nf4 are made of what they
are widened to. The report shows each form's scores beside those of the plain recipe, "none".
The few tasks and steps are for two CPU cores and a small checkout: about six minutes per form.
"""

from configs import base, study_base


def get_config(arg=None):
    config = study_base.get_config()
    config.ranks = (16,)
    config.sets = ("T11",)
    config.rounds = (0,)
    config.learning_rates.lora = (1e-3,)
    config.variants = {form: {"model_quantization": form} for form in ("int8", "nf4", "gguf")}
    config.measure.spectra = False

    run = config.run
    run.model = ".cache/SmolLM2-135M-Instruct.Q4_1.gguf"
    run.epochs = 1
    run.batch_size = 8
    run.micro_tokens = 1024
    run.loss_chunk = 128
    run.remat = "full"
    run.checkpoint_every = 100
    run.tracker = "none"
    run.lora.dropout = 0.0  # drawing the masks is slow on a CPU
    run.optim.warmup_steps = 5
    run.data.sizes = (3, 6, 11)  # the train tasks of a small checkout
    run.data.train_per_task = 40
    run.data.test_per_task = 12
    run.data.validation_per_task = 0
    run.data.answer_only = True
    run.data.loss_mean = "examples"
    run.data.source_length = 320
    run.data.target_length = 64
    run.data.buckets = (384,)
    run.data.packed = True
    run.eval.max_new_tokens = 24
    run.eval.buckets = (128, 192, 320)
    run.eval.max_batch = 32
    run.eval.batch_tokens = 4096
    return base.override(config, arg, **study_base.SHORT)
