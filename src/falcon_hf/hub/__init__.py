"""Drafters as repos: conversion of other projects' checkpoints, cards, publishing, finding."""
