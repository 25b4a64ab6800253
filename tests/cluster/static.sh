#!/bin/sh
# Cargo's RUSTC_WORKSPACE_WRAPPER for images: our programs with nothing left to load, so that an image is one file.
#
# A wrapper and no RUSTFLAGS, because those would build every dependency once more: what is static is decided
# when a program is linked, and only our own programs are.
case " $* " in
  # Cargo asks what the compiler can do; its answer is for every crate.
  *" --print="*) exec "$@" ;;
  *" --crate-type bin "*) exec "$@" -C target-feature=+crt-static ;;
  *) exec "$@" ;;
esac
