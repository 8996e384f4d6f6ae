"""Caffe's message types, generated from caffe.proto beside this file."""

from . import caffe_pb2

__all__ = ["caffe_pb2"]
