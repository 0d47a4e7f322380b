// `mma.sync` over tiles in shared memory, for architectures without wgmma.
#pragma once
#include "frag.cuh"
