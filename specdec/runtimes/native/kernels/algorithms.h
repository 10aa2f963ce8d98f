/* What is written once for every instruction set. */
#include "norm.c"
#include "linear.c"
#include "attention.c"
#include "pack.c"
#include "layers.c"
#include "draft.c"
