"""What is done to a model: conversion, merging, adapters, calibration, and its summary."""
