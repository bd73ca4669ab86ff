"""The options of a spec that TAO does not have: section ``ddetr_mm`` of experiments and of convert."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import StrictBool

from ddetr_mm.spec.fields import OURS, Int, NonNegativeInt, PositiveInt, Section, section, spec_field


class EarlyStoppingConfig(Section):
    """Ending training where a metric of validation no longer improves (mmengine's EarlyStoppingHook)."""

    patience: PositiveInt | None = spec_field(
        None,
        origin=OURS,
        doc="Validations without improvement after which training ends; null: it never ends early.",
    )
    monitor: str = spec_field(
        "val_mAP50",
        origin=OURS,
        doc="""The metric, a name of status.json: val_mAP, val_mAP50, val_loss, its parts, train_loss.""",
    )
    mode: Literal["min", "max"] | None = spec_field(
        None,
        origin=OURS,
        doc="Whether a small or a large value is better; null: min for losses, else max.",
    )
    min_delta: float = spec_field(
        0.001, origin=OURS, gt=0.0, doc="The smallest change of the metric that counts as improvement."
    )


class AutomlParameter(Section):
    """A field that AutoML searches besides TAO's sixteen, searches otherwise, or leaves as it is."""

    field: str = spec_field(
        "", origin=OURS, doc="Dotted path of a field that train reads and that has a single value."
    )
    search: StrictBool = spec_field(
        True, origin=OURS, doc="Whether the field is searched; false: it stays as the spec has it."
    )
    range: list[float] | None = spec_field(
        None,
        origin=OURS,
        filled=True,
        doc="""Smallest and largest value, within the field's bounds. null: the field's own for AutoML, or its
        bounds.""",
    )
    choices: list[str] | None = spec_field(
        None,
        origin=OURS,
        filled=True,
        doc="The only values that are tried, in place of a range. null: all options of a field with some.",
    )
    log: StrictBool | None = spec_field(
        None,
        origin=OURS,
        doc="""Whether values are drawn evenly over the orders of magnitude. null: as for the field otherwise,
        that is true for learning rates and weight decay.""",
    )


class AutomlConfig(Section):
    """The search for better values of a spec's fields by ``ddetr-mm automl``."""

    algorithm: Literal["bayesian", "hyperband", "bohb", "asha", "random", "grid"] = spec_field(
        "bayesian",
        origin=OURS,
        doc="""How values are chosen. bayesian: by the trials so far (TPE); hyperband: at random, and trials
        that fall behind end early (Hyperband); bohb: both; asha: as hyperband, with successive halving alone;
        random: at random; grid: all combinations of choices.""",
    )
    max_trials: PositiveInt = spec_field(20, origin=OURS, doc="Number of trials, failed ones included.")
    max_epochs: PositiveInt = spec_field(
        27, origin=OURS, doc="Epochs of a trial; takes the place of train.num_epochs."
    )
    reduction_factor: Int = spec_field(
        3,
        origin=OURS,
        ge=2,
        doc="""With hyperband, bohb and asha: trials are compared after 1 epoch, and each time that their
        number of epochs has grown by this factor; about one in as many continues.""",
    )
    metric: str = spec_field(
        "val_mAP50",
        origin=OURS,
        doc="""What is optimized, a name of status.json: val_mAP, val_mAP50, val_loss, its parts, train_loss.
        A trial counts with its best validation.""",
    )
    direction: Literal["maximize", "minimize"] | None = spec_field(
        None,
        origin=OURS,
        doc="Whether a large or a small value is better; null: minimize for losses, else maximize.",
    )
    timeout_hours: float | None = spec_field(
        None,
        origin=OURS,
        gt=0.0,
        doc="""Hours after which the command ends. Running trials stop with a checkpoint, and the same command
        continues them. null: no limit.""",
    )
    concurrent: PositiveInt = spec_field(
        1,
        origin=OURS,
        doc="""Trials that run at once on this machine. The GPUs of train.gpu_ids are divided among them.""",
    )
    keep_checkpoints: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="Keep the checkpoints of all trials; false: those of the best one alone.",
    )
    storage: str | None = spec_field(
        None,
        origin=OURS,
        secret=True,
        doc="""Where the study is kept: an Optuna storage URL, such as postgresql+psycopg://user@host/name,
        which several machines may share. null: study.db in results_dir/automl. A password in it is never
        written.""",
    )
    default_parameters: StrictBool = spec_field(
        True,
        origin=OURS,
        doc="Search the fields that TAO marks for AutoML; false: those listed in parameters alone.",
    )
    parameters: list[AutomlParameter] = spec_field(
        [], origin=OURS, doc="Fields to search besides, to search otherwise, or to leave as they are."
    )


class OwnSection(Section):
    """Options that TAO does not have; at their defaults a spec means what it means to TAO."""

    backbone: dict[str, Any] | None = spec_field(
        None,
        origin=OURS,
        doc="""Configuration of any mmdet backbone (type: ResNet, depth: 18, ...), used in place of
        model.backbone; null: model.backbone decides.""",
    )
    zero_padded_values: StrictBool | None = spec_field(
        None,
        origin=OURS,
        doc="""Zero the attention values at padded positions, so that a prediction does not depend on the
        padding of its batch. null: as the checkpoint was trained, else false as in TAO.""",
    )
    checkpoint_entry: str | None = spec_field(
        None,
        origin=OURS,
        doc="""Which set of weights to read where a checkpoint holds several: the dotted path of its
        dictionary, then the prefix of its keys where needed (state_dict, ema.module, student). null: one is
        chosen by a rule, and the log names it and the others.""",
    )
    use_ema: Literal["auto", True, False] = spec_field(
        "auto",
        origin=OURS,
        doc="""Whether to read averaged weights (EMA) from a checkpoint that holds them beside the others.
        auto: where it has any; true: they must be there; false: the weights of the last step. A resumed run
        resumes both.""",
    )
    resize: Literal["pillow", "fast"] = spec_field(
        "pillow",
        origin=OURS,
        doc="""How images are resized. pillow: TAO's pixels. fast: plain bilinear resizing without
        antialiasing, as stock mmdet does it; in training, JPEGs much larger than the largest size asked for
        are decoded at a half, a quarter or an eighth.""",
    )
    keep_last_batch: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""What is done with the images that do not fill a batch of all GPUs at the end of an epoch.
        false: leave them out, as TAO does (others in the next epoch); true: train a shorter step of them. A
        data set smaller than one batch is always trained whole.""",
    )
    cover_all_images: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""With dataset.train_sampler uniform_sampler or non_uniform_sampler: take every image at least
        once an epoch; processes whose files hold fewer images repeat some. false: uniform_sampler draws with
        replacement, non_uniform_sampler takes as many of each process as the smallest has.""",
    )
    missing_images: Literal["error", "replace"] = spec_field(
        "error",
        origin=OURS,
        doc="""What training does with an image file that is missing or cannot be decoded. error: stop and
        name it; replace: name it in the log, take another image, and count how many were replaced.""",
    )
    category_ids: Literal["file", "by_name"] | None = spec_field(
        None,
        origin=OURS,
        doc="""Where category ids come from. file: the annotation files, as in TAO, from 1 and below
        dataset.num_classes. by_name: the class names of the training, validation and test files together,
        sorted, are numbered from 1; ids may then be any numbers or texts, and differ between files. The
        numbers are in category_ids.json and in the checkpoint. null: file; in evaluate by_name where the
        checkpoint was trained so.""",
    )
    merge_categories: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""What is done with several categories of one name. false: refuse them; true: take them for one
        class, with the smallest of their ids.""",
    )
    strict_annotations: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""Annotations that have to be left out (of an image or a category that is not in the file, or
        without a box, polygon or RLE). false: leave them out and count them in the log; true: an error.""",
    )
    strict_images: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""What inference does with an image file that cannot be read. false: skip it, list it in
        skipped.json, count it in status.json; true: stop with an error.""",
    )
    data_timeout_s: NonNegativeInt = spec_field(
        300,
        origin=OURS,
        doc="""Seconds after which a batch that does not come from the data workers ends the run, with the
        file that each of them reads; 0: never.""",
    )
    quick_check: StrictBool = spec_field(
        True,
        origin=OURS,
        doc="""Before training starts, check the annotations and a sample of the image files, and stop
        if they are wrong.""",
    )
    validation_loss: StrictBool = spec_field(
        True,
        origin=OURS,
        doc="""Compute the loss in the validations of training too, from the predictions made anyway: val_loss
        and its parts in status.json, TensorBoard and the curves, as TAO does. false: the metrics alone.""",
    )
    validation_pictures: NonNegativeInt = spec_field(
        0,
        origin=OURS,
        doc="""How many pictures of every validation go to TensorBoard and Weights & Biases, ground truth
        beside predictions; they are the same images each time, spread over the validation data. 0: none.""",
    )
    keep_best: StrictBool = spec_field(
        True,
        origin=OURS,
        doc="""Keep the checkpoint with the best val_mAP50 as model_best_NNN.pth, with a link
        dd_model_best.pth. train.checkpointer, with its enable_topk, chooses more closely.""",
    )
    early_stopping: EarlyStoppingConfig = section(EarlyStoppingConfig, origin=OURS)
    max_hours: float | None = spec_field(
        None,
        origin=OURS,
        gt=0.0,
        doc="""Hours after which a scheduler would end the process. Training ends before, with a checkpoint
        and exit status 0, and the same command continues it. null: no limit.""",
    )
    stop_after_epoch: PositiveInt | None = spec_field(
        None,
        origin=OURS,
        doc="""Number of epochs after which training ends, validated and with a checkpoint, though
        train.num_epochs is larger; the same command with a larger number, or null, continues it. The schedule
        is that of all epochs.""",
    )
    ema: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""Average the weights over the steps (mmengine's EMAHook). Validation is of the average, and
        checkpoints carry both sets: see ddetr_mm.use_ema.""",
    )
    ema_momentum: float = spec_field(
        0.0002,
        origin=OURS,
        gt=0.0,
        lt=1.0,
        doc="""Share of the new weights in the average at each step, with ddetr_mm.ema; it is larger in the
        first few thousand steps.""",
    )
    log_interval: PositiveInt = spec_field(50, origin=OURS, doc="Steps between two lines of the log.")
    non_finite: Literal["stop", "skip"] = spec_field(
        "stop",
        origin=OURS,
        doc="""What training does with a loss or gradients that are NaN or infinite. stop: end before the
        weights change; skip: leave the step out. Either way the images and the layer are named and the batch
        is saved.""",
    )
    deterministic: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="Use deterministic algorithms throughout: the same command gives the same weights.",
    )
    device: Literal["auto", "cpu", "cuda"] = spec_field(
        "auto",
        origin=OURS,
        doc="Where to run; auto: on a GPU if there is one.",
    )
    accumulate_steps: PositiveInt = spec_field(
        1,
        origin=OURS,
        doc="""Steps whose gradients are summed up before the weights change; the effective batch is
        dataset.batch_size x GPUs x this.""",
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = spec_field(
        "none",
        origin=OURS,
        doc="""Multiply all learning rates by effective batch / lr_base_batch (linear) or by its square root
        (sqrt, usual with AdamW). none: the rates are used as written, as in TAO.""",
    )
    lr_base_batch: PositiveInt | None = spec_field(
        None,
        origin=OURS,
        doc="""The effective batch size that the learning rates are meant for; null: dataset.batch_size,
        that is one GPU without accumulation.""",
    )
    attention: Literal["auto", "mmcv", "triton", "torch"] = spec_field(
        "auto",
        origin=OURS,
        doc="""What a GPU computes deformable attention with. mmcv: its compiled op; triton: kernels that need
        no build; torch: plain PyTorch, slow, on every device; auto: the first of mmcv's op and the Triton
        kernels that computes what PyTorch does on the first images, which is logged.""",
    )
    matcher: Literal["scipy", "torch-linear-assignment"] = spec_field(
        "scipy",
        origin=OURS,
        doc="""What assigns queries to objects in training. scipy: on the CPU, with one copy of the costs a
        step; torch-linear-assignment: on the GPU, for images with hundreds of objects; a package that `pip
        install 'ddetr_mm[matcher]'` brings. Among assignments of equal cost it may choose another one.""",
    )
    compile: Literal["none", "backbone", "all"] = spec_field(
        "none",
        origin=OURS,
        doc="""What torch.compile compiles to fused kernels at the first step of train, evaluate and
        inference: nothing, the backbone, or backbone, neck, encoder and decoder. Worth its compile time
        where images have one or two sizes (dataset.augmentation.fixed_padding); results differ by
        rounding.""",
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = spec_field(
        "default",
        origin=OURS,
        doc="""How torch.compile works, with ddetr_mm.compile. reduce-overhead: also as CUDA graphs, for small
        batches; max-autotune: the same, with kernels chosen by timing them, which takes long.""",
    )
    predict_precision: Literal["fp32", "fp16", "bf16"] = spec_field(
        "fp32",
        origin=OURS,
        doc="""Precision of evaluation and inference; scores and boxes are float32 all the same. bf16 is
        faster on GPUs and on CPUs that multiply bfloat16 in hardware (AMX or AVX-512), which check reports.
        The precision of training is train.precision.""",
    )
    tf32: StrictBool = spec_field(
        True,
        origin=OURS,
        doc="""Multiply float32 numbers in TF32 on GPUs from Ampere on, in train, evaluate and inference:
        several times as fast, factors rounded to 10 bits of mantissa. It matters with precision fp32; beside
        half precision little is float32. false: in full. TAO leaves torch's default: TF32 in convolutions,
        not in matrix products.""",
    )
    profile: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""Record a profile of the first ten training steps with torch.profiler: profile.json, which
        chrome://tracing and Perfetto open, and a table in the log.""",
    )
    resume_optimizer: Literal["from_checkpoint", "from_spec"] = spec_field(
        "from_checkpoint",
        origin=OURS,
        doc="""Whose learning rates, schedule, weight decay and momentum a resumed run has where the spec was
        changed. from_checkpoint: those it was started with, as in TAO; from_spec: the spec's, at the resumed
        epoch. The log has a line for each that differs.""",
    )
    automl: AutomlConfig = section(AutomlConfig, origin=OURS)
    export_fp16: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="Also write the exported graph in half precision, as <name>.fp16.onnx with its parity report.",
    )
    quantize_images: PositiveInt = spec_field(
        128,
        origin=OURS,
        doc="""Most images of dataset.quant_calibration_data_sources that quantize finds ranges with, evenly
        spread over the file.""",
    )
    quantize_max_ap_drop: float = spec_field(
        1.0,
        origin=OURS,
        ge=0.0,
        doc="""Largest loss of AP, in points of 100, of a quantized model on the validation data. A file that
        loses more is kept as <name>.rejected, and quantize fails.""",
    )


class OwnConvertSection(Section):
    """Options of convert that TAO does not have."""

    strict: StrictBool = spec_field(
        False, origin=OURS, doc="Stop at the first bad label or image instead of reporting it."
    )
    allow_empty: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="""Accept label files of which no line can be used, and a conversion without any box; false: both
        end with exit status 2 and nothing is written.""",
    )
    pad_shards: StrictBool = spec_field(
        False,
        origin=OURS,
        doc="Fill short shards with repeated images, as TAO does; false: no repeats.",
    )
    num_workers: NonNegativeInt | None = spec_field(
        None,
        origin=OURS,
        doc="""Processes to use beside this one; null: as many as the cores and the number of images are
        worth.""",
    )
