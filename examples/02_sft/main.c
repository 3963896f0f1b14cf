/* espalier-sft: supervised fine-tuning of the adapter on a task file.  The loop is in ../common/train.c, on the public API. */
#include "train.h"

int main(int argc, char **argv) {
    return train_main(ESP_TRAIN_SFT, argc, argv);
}
