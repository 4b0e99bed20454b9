/*  embed_llm.cpp - the one file of a C++ program that holds the library; nothing else goes in here. */
#define LLM_IMPLEMENTATION
#include "llm.h"
