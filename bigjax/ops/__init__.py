"""Operations with one form a platform, equal in values and gradients: the native one where it is fastest."""
