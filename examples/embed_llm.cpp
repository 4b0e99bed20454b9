/*  embed_llm.cpp - the only file of the C++ program that contains the implementation of llm.h. */
#define LLM_IMPLEMENTATION
#include "llm.h"
