"""Sampling in stages: which network is called where and with what, published values, and boundaries as arguments."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import quick_jit

from fairhuman_jax.diffusion import (
    RULES,
    NoiseSchedule,
    classifier_free,
    ddim,
    delayed_sample,
    dpmpp_2m,
    euler_ancestral,
    pndm,
    row_count,
    rule_named,
    sample,
    snf_fuse,
    stage_steps,
    staged_sample,
    unipc,
)

SD15 = NoiseSchedule.from_config(
    {
        "_class_name": "PNDMScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
)
SCHEDULE = NoiseSchedule(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
SHAPE = (2, 4, 6, 3)
CONDITIONS = {name: np.full(2, value, np.float32) for value, name in enumerate(("null", "text", "augmented"))}
ORDERS = {"pndm": pndm(), "dpmpp_2m": dpmpp_2m(), "unipc": unipc(), "euler_ancestral": euler_ancestral()}


def latents() -> jax.Array:
    return jax.random.normal(jax.random.key(7), SHAPE)


def spread(condition: jax.Array) -> jax.Array:
    return condition[:, None, None, None]


def scene(x, t, condition):
    """A network with a sine, by which it is known in a traced program."""
    return 0.2 * jnp.sin(x + spread(condition)) + 1e-4 * spread(t)


def subject(x, t, condition):
    """A network with a hyperbolic tangent."""
    return 0.2 * jnp.tanh(x * (1.0 + spread(condition))) - 1e-4 * spread(t)


def staged(start=None, final=None, rule=None, schedule=SD15, steps=50, networks=(scene, subject), **options):
    options = CONDITIONS | {"start_merge_step": start, "final_step": final} | options
    first = options.pop("latents", None)
    key = options.pop("key", None)
    return staged_sample(*networks, latents() if first is None else first, key, schedule, steps, rule, **options)


def drawn(*boundaries, **options):
    """`staged` operation by operation: compiling three loops would take longer than running them."""
    with jax.disable_jit():
        return staged(*boundaries, **options)


def stages(jaxpr) -> list[tuple[int, int, int]]:
    """(rows, calls of `scene`, calls of `subject`) of each loop of a traced program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            inner = [inside.primitive.name for inside in equation.params["jaxpr"].jaxpr.eqns]
            found.append((equation.params["length"], inner.count("sin"), inner.count("tanh")))
    return found


@pytest.mark.parametrize(
    ("boundaries", "rule", "expected"),
    [
        ((None, None), None, [(16, 1, 0), (15, 1, 1), (20, 0, 1)]),
        ((15, 30), None, [(16, 1, 0), (15, 1, 1), (20, 0, 1)]),
        ((10, 30), None, [(11, 1, 0), (20, 1, 1), (20, 0, 1)]),
        ((10, 40), None, [(11, 1, 0), (30, 1, 1), (10, 0, 1)]),
        ((15, 30), ddim(), [(16, 1, 0), (15, 1, 1), (19, 0, 1)]),
        ((-1, 50), None, [(51, 1, 1)]),
        ((-1, 20), None, [(21, 1, 1), (30, 0, 1)]),
        ((50, 50), None, [(51, 1, 0)]),
        ((70, 10), None, [(51, 1, 0)]),
        ((30, 10), None, [(31, 1, 0), (20, 0, 1)]),
        ((-1, -1), None, [(51, 0, 1)]),
        ((49, 80), None, [(50, 1, 0), (1, 1, 1)]),
    ],
)
def test_networks_of_each_stage(boundaries, rule, expected):
    program = jax.make_jaxpr(lambda x: staged(*boundaries, rule, latents=x))(latents())
    assert stages(program.jaxpr) == expected


def test_published_number_of_calls():
    found = stages(jax.make_jaxpr(lambda x: staged(15, 30, latents=x))(latents()).jaxpr)
    assert [sum(rows * calls[i] for rows, *calls in found) for i in (0, 1)] == [31, 35]


@pytest.mark.parametrize(("baseline", "base"), [("text", 1), ("null", 0)])
def test_what_each_network_is_asked(baseline, base):
    calls = []

    def network(name):
        def predict(x, t, condition):
            jax.debug.callback(lambda *a: calls.append((name, *(v.tolist() for v in a))), t, condition, ordered=True)
            return jnp.zeros_like(x)

        return predict

    quick_jit(lambda x: staged(15, 30, networks=(network("scene"), network("subject")), latents=x, baseline=baseline))(
        latents()
    ).block_until_ready()
    jax.effects_barrier()
    times = [981, 961, *range(961, 0, -20)]
    expected = []
    for row, time in enumerate(times):
        asked = [("scene", [time] * 4, [0, 1, 0, 1])] if row <= 30 else []
        asked += [("subject", [time] * 4, [base, 2, base, 2])] if row > 15 else []
        expected += asked
    assert calls == expected
    assert (times[15], times[16], times[30], times[31]) == (701, 681, 401, 381)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (lambda x, t: jnp.zeros_like(x), 13.152870586),
        (lambda x, t: jnp.ones_like(x), 0.067191963),
        (lambda x, t: 0.5 * x, 2.601852570),
        (lambda x, t: 0.001 * spread(t) * jnp.ones_like(x), 3.053131402),
    ],
    ids=["zero", "one", "linear", "time"],
)
@pytest.mark.parametrize("boundaries", [(15, 30), (-1, 50)])
def test_published_pndm_values_go_through_the_stages(noise, expected, boundaries):
    """With two networks that agree; the history is carried on, or the last two would be others."""

    def network(x, t, condition):
        return noise(x, t)

    result = drawn(*boundaries, networks=(network, network), latents=jnp.ones(SHAPE))
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", list(RULES))
def test_equal_networks_are_one_network_for_every_rule(name):
    rule, key = rule_named(name), jax.random.key(0)
    conditions = {"null": jnp.zeros(2), "text": jnp.ones(2), "augmented": jnp.ones(2), "baseline": "null"}

    @quick_jit
    def run(x, start, final):
        options = conditions | {"scale_t": 3.0, "key": key}
        return staged(start, final, rule, SCHEDULE, 8, (scene, scene), latents=x, **options)

    guided = classifier_free(scene, jnp.ones(2), jnp.zeros(2), 3.0)
    with jax.disable_jit():
        expected = sample(guided, latents(), key, SCHEDULE, 8, rule)
    for boundaries in ((2, 5), (0, 3)):
        np.testing.assert_allclose(run(latents(), *map(jnp.int32, boundaries)), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def compilations():
    """Counts the programs that XLA compiles from here on."""
    found = []

    def listen(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(details.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return found


def test_one_compilation_serves_every_boundary(compilations):
    def draw(x, start, final):
        return staged(start, final, schedule=SCHEDULE, steps=8, latents=x)

    run = quick_jit(draw)
    settings = [(2, 5), (-1, 8), (8, 8), (-1, -1), (5, 2), (7, 30), (-5, 4)]
    arguments = [(latents(), *map(jnp.int32, boundaries)) for boundaries in settings]
    run(*arguments[0]).block_until_ready()
    assert compilations, "the listener hears compilations"
    compilations.clear()
    results = [run(*each).block_until_ready() for each in arguments]
    assert not compilations
    for boundaries, result in zip(settings, results, strict=True):
        static = drawn(*boundaries, schedule=SCHEDULE, steps=8)
        np.testing.assert_allclose(result, static, rtol=1e-4, atol=1e-5)
    several = quick_jit(jax.vmap(draw, in_axes=(None, 0, 0)))
    together = several(latents(), *jnp.asarray(settings).T)
    np.testing.assert_allclose(together, results, rtol=1e-4, atol=1e-5)


def test_one_boundary_may_be_traced_alone():
    run = quick_jit(lambda final: staged(2, final, schedule=SCHEDULE, steps=8))
    expected = drawn(2, 5, schedule=SCHEDULE, steps=8)
    np.testing.assert_allclose(run(jnp.int32(5)), expected, rtol=1e-4, atol=1e-5)


def test_a_run_of_the_scene_alone_ignores_the_references():
    def unasked(x, t, condition):
        raise AssertionError("the subject model is not part of this run")

    with jax.disable_jit():
        plain = sample(classifier_free(scene, jnp.ones(2), jnp.zeros(2), 5.0), latents(), None, SD15, 50, pndm())
    np.testing.assert_array_equal(drawn(50, 50, networks=(scene, unasked)), plain)
    np.testing.assert_array_equal(drawn(alpha=1.0, beta=0.6, networks=(scene, unasked)), plain)


def test_a_run_of_the_subject_alone():
    guided = classifier_free(subject, CONDITIONS["augmented"], CONDITIONS["text"], 7.0)
    with jax.disable_jit():
        plain = sample(guided, latents(), None, SD15, 50, pndm())
    np.testing.assert_array_equal(drawn(-1, -1, scale_t=2.0, scale_s=7.0), plain)


def test_fusion_takes_its_arguments_in_order():
    """One row of fusion by hand, with a scale for each model and a scale for each example."""
    scale_t, scale_s, fuse = jnp.asarray([2.0, 3.0]), 4.0, functools.partial(snf_fuse, temperature=0.1)
    result = drawn(-1, 0, ddim(), SCHEDULE, 1, scale_t=scale_t, scale_s=scale_s, fuse=fuse)
    x, t = latents(), jnp.full(2, 1)
    null, text, augmented = CONDITIONS.values()
    fused = fuse(scene(x, t, null), scene(x, t, text), subject(x, t, text), subject(x, t, augmented), scale_t, scale_s)
    with jax.disable_jit():
        expected = sample(lambda x, t: fused[0], x, None, SCHEDULE, 1, ddim())
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_maps_of_every_fused_row():
    result, maps = drawn(15, 30, return_maps=True)
    np.testing.assert_allclose(result, drawn(15, 30), rtol=1e-5, atol=1e-5)
    assert maps.mask.shape == maps.scene.shape == maps.subject.shape == (15, *SHAPE[:3])
    assert maps.mask.dtype == bool and 0.05 < maps.mask.mean() < 0.95

    def before(x, row):
        seen.append(x)
        return x

    seen = []
    drawn(1, 3, rule=ddim(), schedule=SCHEDULE, steps=5, before_step=before)
    _, maps = drawn(1, 3, ddim(), SCHEDULE, 5, return_maps=True)
    times, (null, text, augmented) = ddim().table(SCHEDULE, 5)["timestep"], CONDITIONS.values()
    for index, row in enumerate((2, 3)):
        x, t = seen[row], jnp.full(2, times[row])
        four = scene(x, t, null), scene(x, t, text), subject(x, t, text), subject(x, t, augmented)
        for ours, theirs in zip((m[index] for m in maps), snf_fuse(*four, 5.0)[1:], strict=True):
            np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=1e-4)
    per_channel = functools.partial(snf_fuse, per_channel=True)
    for boundaries, options, shape in (
        ((-1, 50), {}, (51, *SHAPE[:3])),
        ((30, 10), {}, (0, *SHAPE[:3])),
        ((15, 30), {"fuse": per_channel}, (15, *SHAPE)),
    ):
        run = functools.partial(staged, *boundaries, return_maps=True, **options)
        assert {array.shape for array in jax.eval_shape(run)[1]} == {shape}


def test_both_networks_in_one_call():
    calls = []

    def network(weight, x, t, condition):
        return weight * jnp.tanh(x + spread(condition))

    def both(x, t, scene_condition, subject_condition):
        calls.append(x.shape)
        conditions = jnp.stack([scene_condition, subject_condition])
        return jax.vmap(network, in_axes=(0, None, None, 0))(jnp.asarray([0.2, -0.1]), x, t, conditions)

    apart = [functools.partial(network, weight) for weight in (0.2, -0.1)]
    together = drawn(15, 30, networks=apart, both=both)
    assert calls == [(4, *SHAPE[1:])] * 15
    np.testing.assert_allclose(together, drawn(15, 30, networks=apart), rtol=1e-5, atol=1e-5)


def point_network(x, t, condition):
    """Exact noise prediction when the data is one point, the same under every condition."""
    t = t.astype(int)
    return (x - 0.7 * spread(jnp.asarray(SCHEDULE.signal)[t])) / spread(jnp.asarray(SCHEDULE.noise)[t])


@pytest.mark.parametrize("name", list(ORDERS))
def test_forgetting_the_history_keeps_the_levels(name):
    """Every path still ends at the point: no row is repeated or left out."""

    @quick_jit
    def run(x, start, final):
        options = {"networks": (point_network,) * 2, "latents": x, "key": jax.random.key(0)}
        return staged(start, final, ORDERS[name], SCHEDULE, 12, reset_history=True, **options)

    for boundaries in ((4, 8), (0, 3), (1, 1), (-1, 11), (12, 12)):
        np.testing.assert_allclose(run(latents(), *map(jnp.int32, boundaries)), 0.7, atol=5e-3)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_forgetting_the_history_is_a_fresh_start(name):
    rule = ORDERS[name]
    middle = []

    def record(x, row):
        middle.append(x)
        return x

    run = functools.partial(drawn, 3, 3, rule=rule, schedule=SCHEDULE, steps=8)
    kept = run(after_step=record)
    guided = classifier_free(subject, CONDITIONS["augmented"], CONDITIONS["text"], 5.0)
    with jax.disable_jit():
        fresh = sample(guided, middle[3], None, SCHEDULE, 8, rule, start=4)
    np.testing.assert_allclose(run(reset_history=True), fresh, atol=1e-5)
    assert np.abs(kept - fresh).max() > 1e-3


@pytest.mark.parametrize("start", [0, 3])
def test_forgotten_pndm_history_by_hand(start):
    """One network predicts 0 up to a row, the other 1 after it: transfer steps with the newest prediction alone."""

    def network(value):
        return lambda x, t, condition: jnp.full_like(x, value)

    x, conditions = jnp.ones((1, 2, 2, 1)), {name: np.zeros(1, np.float32) for name in CONDITIONS}
    cumprod, value = SD15.alphas_cumprod64, 1.0
    for row, now in enumerate(range(901, 0, -100), start=1):  # row 1 takes the step of row 0 again
        a, b = cumprod[now], cumprod[max(now - 100, 0)]
        value = (b / a) ** 0.5 * value + (row > start) * ((1 - b) ** 0.5 - (b / a * (1 - a)) ** 0.5)
    networks = network(0.0), network(1.0)
    run = functools.partial(drawn, start, start, networks=networks, steps=10, latents=x, **conditions)
    np.testing.assert_allclose(run(reset_history=True), value, rtol=1e-5)
    assert np.abs(run() - value).max() > 1e-2


def test_stochastic_rules_draw_by_row():
    key, rule = jax.random.key(3), euler_ancestral()
    rows = row_count(SCHEDULE, 5, rule)
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, row), SHAPE) for row in range(rows)])
    run = functools.partial(drawn, 1, 3, rule=rule, schedule=SCHEDULE, steps=5)
    np.testing.assert_allclose(run(noise=noise), run(key=key), atol=1e-5)
    with pytest.raises(ValueError, match="expected a key or noise"):
        run()
    with pytest.raises(ValueError, match=r"noise is \(4,"):
        run(noise=noise[:4])


def test_gradients_through_static_stages():
    def loss(strength):
        networks = [lambda x, t, c, n=network: strength * n(x, t, c) for network in (scene, subject)]
        fuse = functools.partial(snf_fuse, temperature=0.5)
        return staged(0, 2, dpmpp_2m(), SCHEDULE, 5, networks, fuse=fuse, scale_t=2.0).mean()

    value = quick_jit(loss)
    numeric = (value(1.0 + 1e-2) - value(1.0 - 1e-2)) / 2e-2
    np.testing.assert_allclose(quick_jit(jax.grad(loss))(1.0), numeric, rtol=1e-2)


def test_delayed_conditioning_is_one_network():
    def run(boundary):
        return delayed_sample(subject, latents(), None, SD15, 50, scale=4.0, start_merge_step=boundary, **CONDITIONS)

    by_stages = drawn(10, 10, networks=(subject, subject), baseline="null", scale_t=4.0)
    np.testing.assert_allclose(quick_jit(run)(jnp.int32(10)), by_stages, rtol=1e-5, atol=1e-5)
    program = jax.make_jaxpr(lambda: run(10))()
    assert stages(program.jaxpr) == [(11, 0, 1), (40, 0, 1)]
    with jax.disable_jit():
        default = delayed_sample(subject, latents(), None, SD15, 50, scale=4.0, alpha=0.2, **CONDITIONS)
    np.testing.assert_allclose(default, by_stages, rtol=1e-5, atol=1e-5)


def test_fractions_of_the_steps():
    assert stage_steps(50, 0.3, 0.6) == (15, 30) and stage_steps(50, 0.2, 0.8) == (10, 40)
    assert stage_steps(30, 0.3, 0.6) == (9, 18) and stage_steps(100, 0.29, 0.57) == (29, 57)
    assert stage_steps(7, 0.0, 1.0) == (0, 7) and stage_steps(7, 0.3, 0.5) == (2, 4)
    with pytest.raises(ValueError, match=r"alpha is 15; expected a fraction of the steps in 0 \.\. 1"):
        stage_steps(50, 15, 30)
    np.testing.assert_array_equal(drawn(alpha=0.2, beta=0.8), drawn(10, 40))
    np.testing.assert_array_equal(drawn(final=40), drawn(15, 40))


def test_refusals():
    with pytest.raises(ValueError, match="baseline is 'prompt'; known: text, null"):
        staged(baseline="prompt")
    with pytest.raises(ValueError, match=r"start_merge_step is 0\.3; expected a row, an integer scalar"):
        staged(0.3, 30)
    with pytest.raises(ValueError, match="return_maps needs ints"):
        quick_jit(lambda start: staged(start, 30, return_maps=True))(jnp.int32(2))
