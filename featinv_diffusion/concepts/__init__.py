"""Concepts: dictionaries of directions in feature space, all used in the same way."""

from featinv_diffusion.concepts.base import ConceptDictionary, principal_angles
from featinv_diffusion.concepts.elastic_net import ElasticNet, self_representation, sparse_codes
from featinv_diffusion.concepts.factorisations import (
    DirectionConcepts,
    KMeansConcepts,
    NMFConcepts,
    PCAConcepts,
)
from featinv_diffusion.concepts.heads import PooledHead, make_head, read_head
from featinv_diffusion.concepts.mcd import MCD
from featinv_diffusion.concepts.sae import SAEConcepts, SparseAutoencoder
from featinv_diffusion.concepts.sae_files import load_concepts

__all__ = [
    "MCD",
    "ConceptDictionary",
    "DirectionConcepts",
    "ElasticNet",
    "KMeansConcepts",
    "NMFConcepts",
    "PCAConcepts",
    "PooledHead",
    "SAEConcepts",
    "SparseAutoencoder",
    "load_concepts",
    "make_head",
    "principal_angles",
    "read_head",
    "self_representation",
    "sparse_codes",
]
