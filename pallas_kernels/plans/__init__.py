"""Plans: block sizes, splits and warps of a kernel, frozen and memoised by the static shapes that they depend on."""
