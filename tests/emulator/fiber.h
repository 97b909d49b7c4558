// Fibers: a stack each, switched by hand.
#pragma once
#include <algorithm>
#include <cstddef>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

constexpr size_t kStackBytes = 256 << 10;  // address space; pages are touched as they are used

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; callee-saved registers lie on the stack
extern "C" void qif_emulator_switch(void** save, void* load);
asm(R"(
.text
.globl qif_emulator_switch
.hidden qif_emulator_switch
qif_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline void switch_context(Context& from, Context& to) { qif_emulator_switch(&from, to); }
inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
  *top = reinterpret_cast<void*>(entry);  // `ret` enters it with the stack aligned as after a call
  context = top - 6;
  std::fill(top - 6, top, nullptr);
}
#else
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
}
#endif

}  // namespace emulator
