"""Our tuners as members of PEFT's own tables."""

import copy
import pickle
import subprocess
import sys

import peft
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from gaintune.errors import GaintuneError
from gaintune.tuners import register
from gaintune.tuners.disel import DiselConfig, DiselModel
from gaintune.tuners.gain import GainConfig, GainModel
from gaintune.tuners.gainlora import GainloraConfig, GainloraModel
from gaintune.tuners.registry import add_peft_type
from gaintune.tuners.svft import SvftConfig, SvftModel
from support import refused

TABLES = [PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING]


def test_the_methods_are_members_of_pefts_enumeration_and_tables():
    assert PeftType.GAIN is PeftType("GAIN") is PeftType["GAIN"] is add_peft_type("GAIN")
    assert PeftType.GAIN == "GAIN" and "GAIN" in list(PeftType) and "GAIN" in PeftType.__members__
    assert list(PeftType).count("GAIN") == 1
    assert pickle.loads(pickle.dumps(PeftType.GAIN)) is copy.deepcopy(PeftType.GAIN) is PeftType.GAIN
    assert repr(PeftType.GAIN) == "<PeftType.GAIN: 'GAIN'>" and PeftType.LORA is PeftType("LORA")
    assert [table[PeftType.GAIN] for table in TABLES] == [GainConfig, GainModel, "gain_"]
    assert [table["DISEL"] for table in TABLES] == [DiselConfig, DiselModel, "lora_"]
    assert (GainModel.prefix, DiselModel.prefix) == ("gain_", "lora_")
    assert [table["SVFT"] for table in TABLES] == [SvftConfig, SvftModel, "svft_"]
    assert [table["GAINLORA"] for table in TABLES] == [GainloraConfig, GainloraModel, "gainlora_"]
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


def test_registering_again_changes_nothing():
    before = [dict(table) for table in TABLES]
    swap, pad = peft.utils.hotswap.hotswap_adapter_from_state_dict, peft.utils.hotswap._pad_lora_weights
    register()
    register()
    assert before == TABLES and peft.utils.hotswap._pad_lora_weights is pad
    assert peft.utils.hotswap.hotswap_adapter_from_state_dict is swap


def test_another_packages_gain_is_named(monkeypatch):
    class Other(PeftConfig):
        pass

    Other.__module__ = "otherpackage.gain"
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.GAIN, Other)
    refused(GaintuneError, r"otherpackage\.gain\..*Other.*'otherpackage'", register)


ORDERS = """
import os, sys
# what PEFT itself imports takes the most time, and forks share it
import torch._inductor.compile_fx, transformers.modeling_utils

assert not {"peft", "gaintune"} & sys.modules.keys()

for program in (
    "import peft, gaintune; peft.PeftType.GAIN",
    "import gaintune, peft; peft.PeftType.GAIN",
    "from gaintune.tuners.disel.config import DiselConfig as C; import peft; peft.get_peft_config(C().to_dict())",
    "from gaintune.tuners.gain.config import GainConfig as C; import peft; peft.get_peft_config(C().to_dict())",
):
    if (child := os.fork()) == 0:
        exec(program)
        assert [peft.PEFT_TYPE_TO_TUNER_MAPPING[name].prefix for name in ("GAIN", "DISEL")] == ["gain_", "lora_"]
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, program
"""


def test_any_order_of_imports_registers():
    subprocess.run([sys.executable, "-W", "ignore", "-c", ORDERS], check=True, timeout=240)
