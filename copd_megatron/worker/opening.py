"""Putting a branch together from its configuration: policy on every rank, actor and spokesman where they belong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist

from copd_megatron.branch import Branch
from copd_megatron.config import RunConfig
from copd_megatron.config.engines import BASE
from copd_megatron.data.capability import Capability, first, open_capability
from copd_megatron.data.prompts import PromptBuilder, load_processor, stop_token_ids
from copd_megatron.data.sampler import Sampler
from copd_megatron.data.stream import PromptStream
from copd_megatron.errors import DataError, WeightsError
from copd_megatron.exchange import Exchange
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.distill import FULL_LOSSES
from copd_megatron.objectives.drift import drift_stats
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.policy import checkpoint, layout
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.policy.resident import ResidentTeachers
from copd_megatron.policy.trainer import Policy
from copd_megatron.rewards.pool import RewardPool
from copd_megatron.rollout.types import Prompt, Sampling
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder
from copd_megatron.steering.steered import SteeredRhythm
from copd_megatron.worker.actor import Actor, Teacher
from copd_megatron.worker.checkpointer import Checkpointer
from copd_megatron.worker.open_engines import OpenEngines
from copd_megatron.worker.probe import Probe, probe_sampling
from copd_megatron.worker.resume import State, own_streams
from copd_megatron.worker.snapshots import Snapshots
from copd_megatron.worker.spokesman import Spokesman


def open_branch(run: str, name: str, exchange: Exchange | None, resume: int, host: str) -> Branch:
    """This rank's part of branch `name`, at checkpoint `resume` (0: the base). Called by every rank of the gang.

    Rank 0 brings the `exchange`. `host` is its node's address.
    """
    torch.set_num_threads(1)
    folder = RunFolder(run)
    config = folder.config()
    parallel = config.branch(name).parallel
    degrees = parallel.layout()
    layout.initialize(degrees, config.seed)

    precision = config.precision
    policy = Policy(
        config.base,
        degrees,
        config.optimizer,
        precision.params,
        precision.max_tokens_per_microbatch,
        precision.recompute,
        precision.fp8_choice(),
    )
    if config.start(name) != config.base and not resume:
        policy.load_hf(config.start(name))
    saved = _load(policy, config, folder, name, resume) if resume else None
    actor = probe = frozen = spokesman = None
    if layout.is_replica_leader():
        engines = OpenEngines(config, folder, name, host)
        actor, probe = _open_actor(config, name, engines)
        frozen = engines.frozen() if actor.sends else None
        if saved is not None:
            positions = own_streams(saved, layout.data_parallel_rank(), layout.data_parallel_size())
            for capability, position in positions.items():
                actor.streams[capability].load_state_dict(position)
    if exchange is not None:
        exchange.know([branch.name for branch in config.trained], config.teacher.wait_seconds)
        tensorboard = folder.path / "tensorboard" / name if config.log.tensorboard else None
        spokesman = Spokesman(exchange, folder.branch(name), tensorboard)
        spokesman.resume(resume)
    losses = _loss_settings(config, name)
    rhythm = config.rhythm.open()
    if saved is not None and isinstance(rhythm, SteeredRhythm):
        rhythm.load_state_dict(saved[0]["rhythm"])  # the same on every rank
    residents = _residents(config, folder, name) if config.teacher.where == "resident" and losses.teachers else None
    return Branch(
        config,
        name,
        folder,
        policy,
        partial(branch_loss, settings=losses),
        partial(drift_stats, settings=replace(losses, teachers=1)),
        actor,
        probe,
        spokesman,
        Checkpointer(config, name, folder, policy, spokesman, resume),
        frozen,
        rhythm,
        residents,
    )


def _residents(config: RunConfig, folder: RunFolder, name: str) -> ResidentTeachers:
    """A model like the policy's, for the teachers of branch `name`."""
    precision = config.precision
    degrees = config.branch(name).parallel.layout()
    return ResidentTeachers(
        build_model(config.base, degrees, precision.params, fp8=precision.fp8_choice()),
        [teacher for student, teacher in config.edges if student == name],
        Snapshots(folder.snapshots).open,
        config.opd.top_k,
        config.rollout.temperature,
        whole_vocabulary=config.opd.loss in FULL_LOSSES,
    )


def _load(policy: Policy, config: RunConfig, folder: RunFolder, name: str, step: int) -> list[State]:
    """Every rank's state; WeightsError, with the checkpoint that could be used instead, if this one is damaged."""
    checkpoints = RunCheckpoints(folder, [branch.name for branch in config.trained])
    try:
        return checkpoint.load(policy, checkpoints.part(name, step))
    except WeightsError as error:
        # One rank looks, and the others wait: the gang ends with its first rank, and the reason would be lost.
        advice = layout.broadcast_in_gang(checkpoints.advice(step) if dist.get_rank() == 0 else None)
        raise WeightsError(f"{error}. {advice}") from error


def _open_actor(config: RunConfig, name: str, engines: OpenEngines) -> tuple[Actor, Probe]:
    teachers = [teacher for student, teacher in config.edges if student == name]
    observed = teachers or [branch.name for branch in config.trained if branch.name != name]
    test_size = config.eval.problems
    capabilities = {
        capability: open_capability(config.branch(capability), config.data, config.seed, test_size)
        for capability in (name, *observed)
    }
    processor = load_processor(config.base)
    builder = PromptBuilder(processor, config.data.max_prompt_tokens)
    rollout = config.rollout
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        stop_token_ids=stop_token_ids(config.base, processor.tokenizer),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        n=config.rl.group,
    )
    rank, replicas = layout.data_parallel_rank(), layout.data_parallel_size()
    streams = {
        capability.name: PromptStream(
            capability,
            builder,
            Sampler(len(capability.train), config.seed, f"{name}/{capability.name}", rank, replicas),
            skip=config.data.on_error == "skip",
        )
        for capability in capabilities.values()
    }

    def teacher(peer: str, index: int) -> Teacher:
        return Teacher(peer, index, engines.of(peer), config.opd.top_k, rollout.temperature, peer in config.frozen)

    peers = {peer: teacher(peer, index) for index, peer in enumerate(observed)}
    actor = Actor(
        branch=name,
        seed=config.seed,
        rank=rank,
        engine=engines.of(name),
        streams=streams,
        teachers={peer: replace(peers[peer], engine=engines.as_teacher(peer, peers[peer].engine)) for peer in teachers},
        rewards=RewardPool(config.data.reward_workers, config.data.reward_seconds),
        sampling=sampling,
        normalise_std=config.rl.normalise_std,
        sends=rank == 0 or rollout.engine == "embedded",
    )
    probe = Probe(
        student=name,
        seed=config.seed,
        observed=peers,
        base=teacher(BASE, 0) if config.log.kl_to_base else None,
        prompts={
            capability.name: _probe_prompts(capability, builder, config.log.probe_prompts)
            for capability in capabilities.values()
        },
        sampling=probe_sampling(sampling),
    )
    return actor, probe


def _probe_prompts(capability: Capability, builder: PromptBuilder, count: int) -> list[Prompt]:
    prompts, refused = builder.build_many(first(capability.validation, count), capability.name)
    if not prompts:
        reasons = "; ".join(f"{uid}: {reason}" for uid, reason in refused[:3])
        raise DataError(f"{capability.name}: no validation prompt can be used ({reasons})")
    return prompts


def _loss_settings(config: RunConfig, name: str) -> LossSettings:
    return LossSettings(
        temperature=config.rollout.temperature,
        clip_low=config.rl.clip_low,
        clip_high=config.rl.clip_high,
        opd_loss=config.opd.loss,
        beta=config.opd.beta,
        delta_clip=config.opd.delta_clip,
        jsd_beta=config.opd.jsd_beta,
        overlap_k=config.log.overlap_k,
        importance_cap=config.rl.correction.importance_cap,
        two_sided_mask=config.rl.correction.mask,
        teachers=sum(student == name for student, _ in config.edges),
    )
