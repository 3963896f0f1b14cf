/* espalier-grpo: GRPO on a task file with the built-in rewards, exact + 0.2 match.  The loop is in ../common/train.c, on the public API. */
#include "train.h"

int main(int argc, char **argv) {
    return train_main(ESP_TRAIN_GRPO, argc, argv);
}
