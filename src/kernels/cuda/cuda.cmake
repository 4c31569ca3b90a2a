# liboctavo_cuda.so: attention for compute capability 9.0, where a CUDA compiler is installed. The plan, being host
# code, is in octavo_kernels too, and tested there.
option(OCTAVO_CUDA "Build the CUDA kernels where nvcc is installed" ON)
find_program(nvcc nvcc HINTS /usr/local/cuda/bin)
if(NOT OCTAVO_CUDA OR NOT nvcc)
  message(STATUS "No CUDA kernels: OCTAVO_CUDA is ${OCTAVO_CUDA}, nvcc is ${nvcc}")
  return()
endif()
set(CMAKE_CUDA_COMPILER ${nvcc})
set(CMAKE_CUDA_ARCHITECTURES 90a-real)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
enable_language(CUDA)
# CMake 3.25 does not know that nvcc 13 speaks C++20.
set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)

file(GLOB cuda_sources CONFIGURE_DEPENDS src/kernels/cuda/*.cu)
add_library(octavo_cuda SHARED ${cuda_sources} src/kernels/cuda/plan.cpp
                               src/kernels/kv_layout.cpp src/base/dtype.cpp src/base/error.cpp src/base/tensor.cpp)
target_include_directories(octavo_cuda PUBLIC ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR}/include)
target_compile_options(octavo_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-O3 --expt-relaxed-constexpr -Xptxas=-v -Xcompiler=-Wall,-Wextra,-Werror>)
# The toolkit's cuBLASLt, found at run time; where there is none the library does not open, and the program says so.
find_library(cublas_lt cublasLt HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}/../lib REQUIRED)
target_link_libraries(octavo_cuda PRIVATE ${cublas_lt})
target_include_directories(octavo_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
set_target_properties(octavo_cuda PROPERTIES CUDA_COMPILER_LAUNCHER ${PROJECT_SOURCE_DIR}/scripts/ptxas-report
                                             LIBRARY_OUTPUT_DIRECTORY ${CMAKE_RUNTIME_OUTPUT_DIRECTORY})
# 26 attention kernels (table.cu), 6 widen, 6 append, 3 combine, 38 of the other ops.
add_test(NAME ptxas COMMAND ${PROJECT_SOURCE_DIR}/scripts/ptxas-report --check
                            ${PROJECT_BINARY_DIR}/CMakeFiles/octavo_cuda.dir 79)

# Built here so that it keeps building; on a machine without a GPU it says that it skips.
file(GLOB conformance_sources CONFIGURE_DEPENDS tests/conformance/cuda_*.cpp tests/conformance/cuda_*.cu)
add_executable(octavo_cuda_conformance ${conformance_sources})
target_link_libraries(octavo_cuda_conformance PRIVATE octavo_cuda octavo_kernels)
add_test(NAME cuda_conformance COMMAND octavo_cuda_conformance)
set_tests_properties(cuda_conformance PROPERTIES SKIP_RETURN_CODE 77)
file(GLOB bench_sources CONFIGURE_DEPENDS bench/*.cu)
add_executable(octavo_attention_bench EXCLUDE_FROM_ALL ${bench_sources})
target_link_libraries(octavo_attention_bench PRIVATE octavo_cuda)
