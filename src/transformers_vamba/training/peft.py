# SPDX-License-Identifier: Apache-2.0
"""PEFT's model, with `alpha` trained and saved beside the adapter. Needs `peft`."""

from pathlib import Path

from peft import PeftModel
from safetensors.torch import load_file, save_file

from .model_card import write_model_card


class VambaPeftModel(PeftModel):
    """
    A [`~peft.PeftModel`] that trains each layer's `alpha` beside the adapter, and saves it with the adapter's weights.

        model = VambaPeftModel(model, LoraConfig(target_modules=lora_target_modules(model.config)))

    PEFT's `modules_to_save` copies modules, and its `target_parameters` adapts matrices: neither takes `alpha`, a
    parameter of one number. Loading needs nothing of this class: `PeftModel.from_pretrained` and a `Trainer` that
    resumes load what the file holds. To train on, `VambaPeftModel.from_pretrained(model, folder, is_trainable=True)`.
    `alpha` is one for all adapters of a model, and stays as trained where they are switched off or merged.
    """

    def __init__(self, model, peft_config, adapter_name: str = "default", **kwargs):
        # By a task, `from_pretrained` would choose a class of PEFT's own, which neither trains nor saves `alpha`.
        peft_config.task_type = None
        super().__init__(model, peft_config, adapter_name, **kwargs)
        if not peft_config.inference_mode:
            for name, parameter in self.named_parameters():
                if name.endswith(".alpha"):
                    parameter.requires_grad_()

    def create_or_update_model_card(self, output_dir: str) -> None:
        """As PEFT's, with an example of a video instead of an empty form."""
        if not (Path(output_dir) / "README.md").exists():
            write_model_card(output_dir, self.config.name_or_path, is_adapter=True)
        super().create_or_update_model_card(output_dir)

    def save_pretrained(self, save_directory, state_dict=None, is_main_process: bool = True, **kwargs):
        """As [`~peft.PeftModel.save_pretrained`], and always safetensors."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        kwargs["safe_serialization"] = True
        super().save_pretrained(save_directory, state_dict=state_dict, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        alphas = {name: value.contiguous() for name, value in state_dict.items() if name.endswith(".alpha")}
        for adapter_name in kwargs.get("selected_adapters") or self.peft_config:
            folder = Path(save_directory) / ("" if adapter_name == "default" else adapter_name)
            file = folder / "adapter_model.safetensors"
            save_file(load_file(file) | alphas, file, metadata={"format": "pt"})
