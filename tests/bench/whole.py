"""Rows of whole runs: a picture by a pipeline, the demo's pictures, a step of training."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff import (
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    TextToImage,
    UNet2DConditionModel,
    optimize,
)
from minidiff.schedule import randn
from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image, image_generator
from tests.bench.engines import OURS, PLAIN, Row, has_compiler
from tests.bench.folder import write_folder
from tests.bench.measure import Program

SMALL = {"in_channels": 4, "out_channels": 4, "block_out_channels": (32, 64, 128), "layers_per_block": 1,
         "down_block_types": ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "cross_attention_dim": 128,
         "attention_head_dim": (1, 2, 4), "norm_num_groups": 8, "use_linear_projection": True}
PROMPT = "a herb shop"
HANDS = ("楷書", "行書", "草書", "隸書")
CAPTIONS = [f"{sign} {hand}" for sign in "春夏秋冬雪" for hand in HANDS]         # 20, as the demo's


class Picture(Row):
    """Text to picture with SD 1.5's pipeline, by DPM-Solver++ with guidance."""

    engines = (OURS, "diffusers", "diffusers, tuned")
    rounds, steps, warm = 1, 20, True
    loose = (*Row.loose, "diffusers, tuned")            # its VAE in channels last, as in models.Decoder

    def __init__(self, *args, size: int = 512, **options):
        super().__init__(*args, **options)
        self.size = size
        self.title = f"SD 1.5, text to a picture of {size} x {size}, {self.steps} steps of DPM-Solver++"
        if not (self.folder / "model_index.json").exists():
            write_folder(self.folder)

    def build(self, name: str) -> Program:
        """A pipeline loaded from the row's folder."""
        if name == OURS:
            pipe = StableDiffusionPipeline.from_pretrained(self.folder)
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
            for part in (pipe.unet, pipe.vae, pipe.text_encoder):
                optimize(part)
            return self.program(pipe, progress=False)
        import diffusers

        pipe = diffusers.StableDiffusionPipeline.from_pretrained(self.folder, safety_checker=None)
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if name == "diffusers, tuned":
            for part in (pipe.unet, pipe.vae):
                part.to(memory_format=torch.channels_last)
            pipe.fuse_qkv_projections()
        return self.program(pipe)

    def program(self, pipe: object, **options) -> Program:
        """Calls of either pipeline, from the same noise; one of a single step as a warm-up."""
        side = self.size // 8
        noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(1))

        def draw(steps: int) -> list[Tensor]:
            return [pipe(PROMPT, num_inference_steps=steps, height=self.size, width=self.size,
                         latents=noise.clone(), output_type="pt", **options).images]

        draw(1)
        return lambda: draw(self.steps)


class Demo(Row):
    """What train.sample does for the demo: 20 pictures by 30 steps of DDIM with guidance."""

    engines = (OURS, PLAIN, "diffusers", "diffusers, tuned")
    rounds, steps = 3, 30
    guidance, seed = 1.5, 7

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.title = f"the demo's model, 20 pictures of 64 x 64, {self.steps} steps of DDIM with guidance"
        self.model = build_text_to_image(PRESETS["small"], ImageFormat(64, 1, 2), CAPTIONS).eval()

    def build(self, name: str) -> Program:
        """The model itself, or its parts in the classes of diffusers and transformers."""
        if name in (OURS, PLAIN):
            model = copy.deepcopy(self.model)
            model = optimize(model) if name == OURS else model
            return lambda: [model.sample(CAPTIONS, self.seed, self.steps, self.guidance)]
        return self.theirs(self.model, name == "diffusers, tuned")

    def theirs(self, model: TextToImage, tuned: bool) -> Program:
        """The usual loop, from the same noise."""
        import diffusers
        import transformers

        model.save(self.folder)
        unet = diffusers.UNet2DConditionModel.from_pretrained(self.folder / "unet").eval()
        text = transformers.CLIPTextModel.from_pretrained(self.folder / "text_encoder").eval()
        sampler = diffusers.DDIMScheduler.from_pretrained(self.folder / "scheduler")
        if tuned:
            unet.to(memory_format=torch.channels_last).fuse_qkv_projections()
        own = [image_generator(self.seed, i) for i in range(len(CAPTIONS))]
        noise = randn((len(own), *model.latent_shape), own, torch.device("cpu"), torch.float32)

        def draw() -> list[Tensor]:
            words = [*[""] * len(CAPTIONS), *CAPTIONS]
            ids = model.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
            context = text(ids).last_hidden_state
            sampler.set_timesteps(self.steps)
            x = noise
            for t in sampler.timesteps:
                free, guided = unet(torch.cat([x, x]), t, context).sample.chunk(2)
                x = sampler.step(free + self.guidance * (guided - free), t, x,
                                 use_clipped_model_output=True).prev_sample
            return [F.pixel_shuffle(x, model.format.fold).clamp(-1, 1)]

        return draw


class Train(Row):
    """Forward and backward of the demo's UNet; the gradients are what is compared. Ours as training runs it:
    optimize is for inference."""

    title, rounds = "a training step of the demo's UNet, 20 x 4 x 32 x 32: forward, loss, backward", 5

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.start = UNet2DConditionModel(**SMALL)
        self.inputs = (torch.randn(20, 4, 32, 32), torch.randint(1000, (20,)), torch.randn(20, 5, 128))
        self.target = torch.randn(20, 4, 32, 32)

    @property
    def engines(self) -> tuple[str, ...]:
        """Ours first."""
        return (OURS, "diffusers", "diffusers, tuned", *("diffusers, compiled",) * has_compiler())

    def build(self, name: str) -> Program:
        """Channels last, but for diffusers as it comes. Fused projections would be other parameters."""
        if name == OURS:
            model: nn.Module = UNet2DConditionModel(**SMALL)
        else:
            import diffusers

            model = diffusers.UNet2DConditionModel(**SMALL)
        model.load_state_dict(self.start.state_dict())
        layout = torch.contiguous_format if name == "diffusers" else torch.channels_last
        model.to(memory_format=layout)
        x, *rest = self.inputs
        x = x.contiguous(memory_format=layout)
        run = torch.compile(model) if name == "diffusers, compiled" else model
        parameters = dict(model.named_parameters())

        def step() -> list[Tensor]:
            with torch.enable_grad():
                loss = F.mse_loss(run(x, *rest).sample, self.target)
                model.zero_grad()
                loss.backward()
            return [loss.detach(), *(parameters[key].grad for key in self.start.state_dict())]

        return step
