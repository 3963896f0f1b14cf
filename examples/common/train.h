/* The loop around the trainer that espalier-sft and espalier-grpo share: progress, signals, the result line. */
#ifndef EXAMPLES_TRAIN_H
#define EXAMPLES_TRAIN_H

#include <espalier/espalier.h>

/* What main() returns. */
int train_main(esp_trainer_kind kind, int argc, char **argv);

#endif
