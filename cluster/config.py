"""Baton's configuration: one typed model, filled from flags, environment variables and baton.yaml,
in this order of precedence."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from cluster.config_names import leaves, misspelt_variables, variable
from cluster.config_problems import unreadable_variable, wrong_values
from cluster.logs import FORMAT_VARIABLE
from cluster.scheduler.handover import HandOver
from cluster.scheduler.policies import DEFAULT, policy_names

CONFIG_FILE = "baton.yaml"
CONFIG_VARIABLE = "BATON_CONFIG"
BUNDLED_MODEL = Path(__file__).parent / "bundled" / "recall"
BUNDLED_MODEL_NAME = "baton-recall"
OPERATOR_TOKEN = "BATON_OPERATOR_TOKEN"
ROUTER_SETTINGS = "BATON_ROUTER_SETTINGS"
"""What a router is told at its start, secrets among it, in JSON."""

VLLM_ARGS_EXAMPLE = ["--max-model-len", "4096"]


class BadConfig(Exception):
    """A value that Baton cannot use. The message names it and says what would be right."""


class HandoffConfig(BaseModel):
    """The KV hand-off."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    inbox_bytes: int = Field(1 << 30, gt=0, description="KV bytes that may wait on a worker")
    staged_bytes: int = Field(256 << 20, gt=0, description="KV bytes that may wait to be sent")
    credit_deadline_s: float = Field(
        5, gt=0, description="time a transfer may wait for room on the worker that it goes to"
    )
    transfer_deadline_s: float = Field(60, gt=0, description="time for one transfer")
    adopt_deadline_s: float = Field(
        10, gt=0, description="time a decode leg waits for its KV before it recomputes the prompt"
    )
    idle_s: float = Field(30, gt=0, description="time after which an untouched transfer is dropped")
    unclaimed_s: float = Field(
        3, gt=0, description="time that KV which has come waits for its router to claim it"
    )
    when: HandOver = Field(
        "always",
        description="'cheaper': a prompt is computed where it decodes if that should cost less",
    )
    transport: Literal["auto", "grpc", "collective", "nixl"] = Field(
        "grpc",
        description="how KV is sent; 'collective' is torch.distributed, 'nixl' is UCX, which "
        "`make setup-nixl` installs",
    )
    codec: Literal["none", "fp8", "int8"] = Field(
        "none", description="how KV is written on the wire: exact, or in one byte a channel"
    )
    overlap: Literal["auto", "always", "never"] = Field(
        "auto", description="push layers while prefill computes, or all of them in one go after it"
    )
    one_go_ms: float = Field(
        20, ge=0, description="auto: a transfer expected to take no longer goes in one go"
    )


def _known_policy(name: str) -> str:
    names = policy_names()
    if name not in names:
        listed = " or ".join([", ".join(map(repr, names[:-1])), repr(names[-1])])
        raise PydanticCustomError("unknown_policy", "input should be {names}", {"names": listed})
    return name


class LocalNode(BaseModel):
    """A Ray node to start on this machine, declaring what it likes: for trying placement."""

    model_config = ConfigDict(extra="forbid")

    accelerator: str | None = None
    cpus: int = Field(default=1, gt=0)
    gpus: int = Field(default=0, ge=0)


class SloClassConfig(BaseModel):
    """What a class of requests is promised, and how it queues."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ttft_ms: float | None = Field(default=None, gt=0)
    tpot_ms: float | None = Field(default=None, gt=0)
    priority: int = Field(default=0, ge=0)

    def seconds(self) -> dict[str, float | int | None]:
        """As the scheduler's `SloClass` has it."""
        ttft_s = None if self.ttft_ms is None else self.ttft_ms / 1000
        tpot_s = None if self.tpot_ms is None else self.tpot_ms / 1000
        return {"ttft_s": ttft_s, "tpot_s": tpot_s, "priority": self.priority}


class _File(YamlConfigSettingsSource):
    def __call__(self) -> dict[str, Any]:
        """Without names that have no value, such as a section all of which is commented out."""
        known = self.settings_cls.model_fields
        values = super().__call__().items()
        return {name: value for name, value in values if value is not None or name not in known}


class BatonConfig(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="BATON_",
        env_nested_delimiter="__",
        extra="forbid",
        allow_inf_nan=False,
        nested_model_default_partial_update=True,
    )

    model: str | None = Field(
        None, description="model folder or Hugging Face name; the bundled model if not given"
    )
    name: str = Field(
        "baton", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="the cluster's name"
    )
    host: str = Field("127.0.0.1", description="address the router listens on")
    port: int = Field(8000, ge=1, le=65535, description="port the router listens on")
    routers: int = Field(
        1, ge=1, le=64, description="routers, which listen on the port and those after it"
    )
    prefill: int = Field(1, ge=0, description="workers in the prefill pool")
    decode: int = Field(1, ge=0, description="workers in the decode pool")
    prefill_accelerator: str | None = Field(None, description="only this accelerator prefills")
    decode_accelerator: str | None = Field(None, description="only this accelerator decodes")
    ray_address: str | None = Field(
        None, description="Ray cluster to join ('auto' or an address); started here if not given"
    )
    redis_url: str | None = Field(
        None, description="Redis to use; an embedded one is started if not given"
    )
    local_nodes: list[LocalNode] = Field(
        default_factory=list,
        description="Ray nodes to start here, as a JSON list (default: one that has this machine)",
        examples=[[{"accelerator": "H100", "cpus": 2}]],
    )
    policy: Annotated[str, AfterValidator(_known_policy)] = Field(
        DEFAULT, description="how requests are placed"
    )
    local_prompt_tokens: int = Field(
        0, ge=0, description="prompts up to this length are not handed over"
    )
    queue_threshold_tokens: int = Field(
        8192, gt=0, description="prompt tokens that may wait before other workers help (splitwise)"
    )
    queue_deadline_s: float = Field(
        30, gt=0, description="time a request waits for a worker before it fails"
    )
    queue_max: int = Field(
        4096, ge=0, description="requests that may wait for a worker; more are refused"
    )
    worker_requests_max: int = Field(
        0,
        ge=0,
        description="requests that a worker is given at a time, others wait in the router; 0: all",
    )
    slo_classes: dict[str, SloClassConfig] = Field(
        default_factory=dict,
        description="what classes of requests are promised, as JSON",
        examples=[{"interactive": {"ttft_ms": 500}}],
    )
    api_key_classes: dict[str, str] = Field(
        default_factory=dict,
        description="classes by the SHA-256 of API keys, as JSON",
        examples=[{"SHA-256 of a key": "interactive"}],
    )
    lease_s: float = Field(
        2.4,
        gt=0.3,
        description="silence after which a member is gone; a router looks twice a second",
    )
    stuck_after_s: float = Field(
        30,
        gt=0,
        description="time without a step, or without a lease, after which a worker starts anew",
    )
    preemption_notice_s: float = Field(
        25, ge=0, description="time that a worker drains when it gets SIGTERM; 0: it ends at once"
    )
    operator_token: str | None = Field(
        None, description="who sends it may announce that a worker ends (POST /baton/notice)"
    )
    start_deadline_s: float = Field(600, gt=0, description="time for all workers to be ready")
    keep_workers: bool = Field(
        False,
        description="leave the workers running when this ends (needs --ray-address and "
        "--redis-url); `baton down` stops them",
    )
    verbose: bool = Field(False, description="show the logs of the router")
    handoff: HandoffConfig = Field(HandoffConfig(), examples=[{"codec": "fp8"}])
    vllm_args: list[str] = Field(
        default_factory=list,
        description="further arguments of `vllm serve`, as a JSON list",
        examples=[VLLM_ARGS_EXAMPLE],
    )
    prefill_vllm_args: list[str] = Field(
        default_factory=list,
        description="arguments of `vllm serve` for the prefill pool only, as a JSON list",
        examples=[VLLM_ARGS_EXAMPLE],
    )
    decode_vllm_args: list[str] = Field(
        default_factory=list,
        description="arguments of `vllm serve` for the decode pool only, as a JSON list",
        examples=[VLLM_ARGS_EXAMPLE],
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = config_file()
        yaml = _File(settings_cls, yaml_file=file)
        return (init_settings, env_settings, yaml) if file else (init_settings, env_settings)

    @property
    def model_path(self) -> str:
        return self.model or str(BUNDLED_MODEL)


def config_file() -> Path | None:
    """baton.yaml of this folder, or the file that BATON_CONFIG names."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return Path(named)
    return Path(CONFIG_FILE) if Path(CONFIG_FILE).exists() else None


def _check_variables() -> None:
    """The settings source takes variables that are settings, and no notice of others."""
    paths = [*((name,) for name in BatonConfig.model_fields), *(p for p, _ in leaves(BatonConfig))]
    known = [CONFIG_VARIABLE, FORMAT_VARIABLE, *map(variable, paths)]
    misspelt = misspelt_variables(os.environ, known)
    if misspelt:
        raise BadConfig(
            "; ".join(f"{name}: unknown, did you mean {meant}?" for name, meant in misspelt.items())
        )


def load_config(flags: dict[str, Any]) -> BatonConfig:
    """Read the configuration.

    Raises:
        BadConfig: a missing or unreadable file, an unknown name, a wrong value.
    """
    file = config_file()
    if file is not None and not file.is_file():
        raise BadConfig(f"{CONFIG_VARIABLE} names {file}, which is not a file")
    _check_variables()
    try:
        config = BatonConfig(**flags)
    except ValidationError as error:
        raise BadConfig(wrong_values(error, BatonConfig)) from error
    except SettingsError as error:
        raise BadConfig(unreadable_variable(error, BatonConfig)) from error
    except (TypeError, ValueError) as error:
        raise BadConfig(f"{file}: it must hold names and values, as in `port: 8000`") from error
    except Exception as error:
        raise BadConfig(f"{file}: {error}") from error
    if config.port + config.routers > 65536:
        raise BadConfig(f"port: there are no {config.routers} ports from {config.port} on")
    for digest, name in config.api_key_classes.items():
        if name not in config.slo_classes:
            raise BadConfig(f"api_key_classes names {name!r}, which is not one of slo_classes")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            # It may be the key itself, which belongs in no message.
            raise BadConfig(
                f"api_key_classes: what has the class {name!r} is not the SHA-256 of an API key, "
                "64 digits of 0-9 and a-f, as `printf %s KEY | sha256sum` prints it"
            )
    if config.prefill + config.decode == 0:
        raise BadConfig("prefill and decode are both 0: at least one worker is needed")
    return config
