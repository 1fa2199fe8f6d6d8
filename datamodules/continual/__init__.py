"""Streams of experiences that arrive one after another."""
