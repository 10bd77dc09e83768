"""Parametric clothed humans with exact labels: pictures, captions, masks, key points, depth and identity."""

from fairhuman_jax.data.people.dataset import PeopleDataset
from fairhuman_jax.data.people.pack import PeoplePack
from fairhuman_jax.data.people.render import render
from fairhuman_jax.data.people.spec import sample_spec
from fairhuman_jax.data.people.subjects import PeopleScenes, PeopleSubjects, PeopleViews

__all__ = ["PeopleDataset", "PeoplePack", "PeopleScenes", "PeopleSubjects", "PeopleViews", "render", "sample_spec"]
