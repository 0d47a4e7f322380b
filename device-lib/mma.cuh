// `mma.sync` over tiles in shared memory, for architectures without wgmma.
#pragma once
#include "tw/frag.cuh"
